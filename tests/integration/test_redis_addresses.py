"""The bus over TLS and through sentinels, with real servers."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
import trustme

from llm_sidecar.event_bus import EventBus, RedisError
from llm_sidecar.event_bus.followed_stream import BEGINNING, Entry
from tests.redis_server import RedisServer, entries, free_port, require_redis

TIMEOUT = 20.0
"""Seconds that a test waits for a condition before it fails."""


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.02)


async def arrives(bus: EventBus, payload: str) -> None:
    """Asserts that a subscriber gets a published event, and that it is the last entry of the
    stream."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    await bus.register_listener_queue("phi3.test", queue)
    await bus.publish("phi3.test", payload)
    assert await asyncio.wait_for(queue.get(), TIMEOUT) == payload
    await bus.unregister_listener_queue("phi3.test", queue)
    [*_, last] = (await bus.events.page(BEGINNING, 1000)).items
    assert isinstance(last, Entry) and last.fields["data"] == payload


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificates of two authorities, and those that the first has signed."""
    folder, authority = tmp_path_factory.mktemp("certificates"), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
    for name in ("localhost", "client"):
        chain = authority.issue_cert(name).private_key_and_cert_chain_pem
        chain.write_to_path(str(folder / f"{name}.pem"))
    return folder


@contextmanager
def tls_server(certificates: Path) -> Iterator[int]:
    """A server that accepts only clients with a certificate; yields its port."""
    require_redis()
    port, pem = free_port(), str(certificates / "localhost.pem")
    with RedisServer(
        *("--port", "0", "--tls-port", str(port), "--tls-cert-file", pem, "--tls-key-file", pem),
        *("--tls-ca-cert-file", str(certificates / "ca.pem"), "--tls-auth-clients", "yes"),
        *("--tls-replication", "yes"),
    ):
        yield port


def tls_options(certificates: Path, ca: str = "ca.pem") -> str:
    pem = certificates / "client.pem"
    return f"ssl_ca_certs={certificates / ca}&ssl_certfile={pem}&ssl_keyfile={pem}"


async def test_events_go_over_tls(certificates: Path) -> None:
    with tls_server(certificates) as port:
        bus = EventBus(f"rediss://localhost:{port}/0?{tls_options(certificates)}")
        await bus.connect()
        await arrives(bus, "1")
        await bus.close()
        # The certificate is for localhost.
        options = tls_options(certificates)
        bus = EventBus(f"rediss://127.0.0.1:{port}/0?{options}&ssl_check_hostname=false")
        await bus.connect()
        await arrives(bus, "2")
        await bus.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_certificate_that_does_not_fit_is_refused(certificates: Path, host: str) -> None:
    ca = "other.pem" if host == "localhost" else "ca.pem"
    with tls_server(certificates) as port:
        bus = EventBus(f"rediss://{host}:{port}/0?{tls_options(certificates, ca)}")
        with pytest.raises(RedisError, match="CERTIFICATE_VERIFY_FAILED"):
            await bus.connect()
        await bus.close()


@contextmanager
def sentinel(folder: Path, master: int, *lines: str) -> Iterator[int]:
    """A sentinel that watches a master and gives it up after half a second; its port."""
    port, configuration = free_port(), folder / "sentinel.conf"
    watching = (
        f"port {port}",
        "bind 127.0.0.1",
        f"dir {folder}",
        f"sentinel monitor desk 127.0.0.1 {master} 1",
        "sentinel down-after-milliseconds desk 500",
        "sentinel failover-timeout desk 3000",
        *lines,
    )
    configuration.write_text("\n".join(watching) + "\n")
    process = subprocess.Popen(
        ["redis-server", str(configuration), "--sentinel"], stdout=subprocess.DEVNULL
    )
    try:
        with redis.Redis(port=port, decode_responses=True) as client:
            wait_for(lambda: client.ping())
        yield port
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        with suppress(redis.RedisError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError("not true in time")


async def test_a_failover_loses_no_event_and_changes_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_redis()
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.FIRST_DELAY", 0.1)
    monkeypatch.setattr("llm_sidecar.event_bus.subscriber.LONGEST_DELAY", 0.1)
    guarded = ("--requirepass", "desk", "--masterauth", "desk")
    payloads = [str(number) for number in range(200)]
    with (
        RedisServer(*guarded) as first,
        RedisServer("--replicaof", "127.0.0.1", str(first.port), *guarded) as second,
        redis.Redis(port=second.port, password="desk", decode_responses=True) as replica,
        sentinel(tmp_path, first.port, "sentinel auth-pass desk desk") as port,
        redis.Redis(port=port, decode_responses=True) as watcher,
    ):
        wait_for(lambda: replica.info("replication")["master_link_status"] == "up")
        wait_for(lambda: watcher.sentinel_slaves("desk"))
        nobody = free_port()
        url = f"redis+sentinel://:desk@127.0.0.1:{nobody},127.0.0.1:{port}/desk/0"
        bus = EventBus(url)
        assert bus.status()["url"] == url.replace("desk@", "***@")
        await bus.connect()
        for payload in payloads[:100]:
            await bus.publish("phi3.test", payload)
        await until(lambda: replica.xlen("osiris.events") == 100)
        first.kill()
        for payload in payloads[100:]:
            await bus.publish("phi3.test", payload)
        await until(lambda: bus.connected and bus.status()["waiting"] == 0)
        data = [fields["data"] for _, fields in entries(replica, "osiris.events")]
        assert data == payloads
        assert replica.info("replication")["role"] == "master"
        await arrives(bus, "after")
        await bus.close()


async def test_sentinels_that_know_no_such_master_count_as_away(tmp_path: Path) -> None:
    require_redis()
    with RedisServer() as server, sentinel(tmp_path, server.port) as port:
        bus = EventBus(f"redis+sentinel://127.0.0.1:{port}/other")
        with pytest.raises(RedisError, match="No master found for 'other'"):
            await bus.connect()
        await bus.close()


async def test_a_sentinel_with_a_password_of_its_own(tmp_path: Path) -> None:
    require_redis()
    with RedisServer() as server, sentinel(tmp_path, server.port) as port:
        with redis.Redis(port=port) as watcher:
            watcher.execute_command("SENTINEL", "CONFIG", "SET", "announce-hostnames", "no")
            watcher.acl_setuser("guard", enabled=True, passwords=["+watch"], commands=["+@all"])
            watcher.acl_setuser("default", enabled=False, reset_passwords=True)
        bus = EventBus(
            f"redis+sentinel://127.0.0.1:{port}/desk"
            "?sentinel_username=guard&sentinel_password=watch"
        )
        await bus.connect()
        await arrives(bus, "1")
        await bus.close()
