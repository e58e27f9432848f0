"""URLs of Redis: what they mean, and which are refused."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from llm_sidecar.redis_address import RedisAddress, parse


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://h", {}),
        ("redis://h/", {}),
        ("redis://u:p@h:6380/3", {}),
        ("redis://h?db=3&username=u&password=p%3D", {"db": 3, "username": "u", "password": "p="}),
        ("redis://h?client_name=desk&max_connections=1", {"client_name": "desk"}),
        ("redis://h?socket_timeout=0.5&socket_connect_timeout=3600", {"socket_timeout": 0.5}),
        ("redis://h?socket_keepalive=False&health_check_interval=0", {"socket_keepalive": False}),
        ("unix:///run/redis.sock?db=1", {"db": 1}),
    ],
)
def test_options_have_their_types(url: str, options: dict[str, Any]) -> None:
    address = parse(url)
    assert address.url == url.partition("?")[0]
    assert (address.tls, address.master, address.sentinels) == (False, None, ())
    assert {name: address.options[name] for name in options} == options
    assert len(address.options) == url.count("=")


def test_options_of_tls() -> None:
    address = parse(
        "rediss://h?ssl_ca_certs=/ca&ssl_certfile=/c&ssl_keyfile=/k&ssl_password=p"
        "&ssl_min_version=TLSv1.3&ssl_check_hostname=1&ssl_cert_reqs=Required"
    )
    assert address.tls
    assert address.options == {
        "ssl_ca_certs": "/ca",
        "ssl_certfile": "/c",
        "ssl_keyfile": "/k",
        "ssl_password": "p",
        "ssl_min_version": ssl.TLSVersion.TLSv1_3,
        "ssl_check_hostname": True,
        "ssl_cert_reqs": "required",
    }


def test_without_a_certificate_there_is_no_host_name_to_check() -> None:
    options = parse("rediss://h?ssl_cert_reqs=none").options
    assert options == {"ssl_cert_reqs": "none", "ssl_check_hostname": False}


def test_sentinels() -> None:
    url = "redis+sentinel://u:p%40@h1:1,h2,[::1]:3/desk/4"
    assert parse(f"{url}?socket_timeout=1&sentinel_username=s&sentinel_password=t") == RedisAddress(
        url,
        {"username": "u", "password": "p@", "db": 4, "socket_timeout": 1.0},
        master="desk",
        sentinels=(("h1", 1), ("h2", 26379), ("::1", 3)),
        sentinel_options={"username": "s", "password": "t"},
    )
    plain = parse("rediss+sentinel://h1/desk?ssl_ca_certs=/ca")
    assert (plain.tls, plain.options) == (True, {"ssl_ca_certs": "/ca"})
    assert plain.sentinel_options == {}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:6379",
        "http://h",
        "memory://",
        "redis://h:0",
        "redis://h:port",
        "redis://h/x",
        "redis://h/-1",
        "redis://h#x",
        "redis+sentinel://h",
        "redis+sentinel://h/",
        "redis+sentinel:///desk",
        "redis+sentinel://h1,,h2/desk",
        "redis+sentinel://h:port/desk",
        "redis+sentinel://h:0/desk",
        "redis+sentinel://h/desk/x",
        "redis+cluster://h",
        "unix+sentinel://h/desk",
        *(
            f"redis://h?{query}"
            for query in (
                "x",
                "timeout=5",
                "protocol=3",
                "decode_responses=False",
                "retry_on_timeout=yes",
                "db=",
                "db=x",
                "db=-1",
                "db=1&db=2",
                "socket_timeout=abc",
                "socket_timeout=0",
                "socket_timeout=-1",
                "socket_timeout=nan",
                "socket_timeout=inf",
                "socket_timeout=3601",
                "socket_keepalive=maybe",
                "max_connections=0",
                "password=",
                "ssl_ca_certs=/ca",
                "sentinel_password=x",
            )
        ),
        "unix:///s?socket_keepalive=yes",
        "rediss://h?ssl_cert_reqs=perhaps",
        "rediss://h?ssl_min_version=TLSv1",
        "rediss://h?sentinel_username=x",
    ],
)
def test_what_is_not_valid_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(ValueError, match=r"^the Redis URL cannot be read$"):
        parse(url)
