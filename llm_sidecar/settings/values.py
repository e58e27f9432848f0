"""The values that settings take: their types, bounds and descriptions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from llm_sidecar import redis_address
from llm_sidecar.api_keys import KEYS_DESCRIPTION, ApiKey, parse_api_keys
from llm_sidecar.host_names import allowed_host

_VISIBLE: Final = re.compile(r"[!-~]+")
_ORIGIN: Final = re.compile(r"\*|https?://[^\s/?#@*]+")


def integer(least: int, greatest: int) -> Any:
    """The bounds of an integer, both inclusive."""
    return Field(ge=least, le=greatest, description=f"an integer from {least} to {greatest}")


def _split(value: object) -> object:
    """The elements of a comma-separated variable, including empty ones."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _allowed_hosts(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(allowed_host, names))


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if not all(map(_ORIGIN.fullmatch, origins)):
        raise ValueError
    return origins


def _redis_url(url: SecretStr) -> SecretStr:
    if urlsplit(url.get_secret_value()).scheme != redis_address.MEMORY:
        redis_address.parse(url.get_secret_value())
    return url


def _http_url(url: str) -> str:
    parsed = urlsplit(url)
    if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.port == 0:
        raise ValueError
    return url


def _server_urls(urls: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    for secret in urls:
        url = _http_url(secret.get_secret_value())
        parsed = urlsplit(url)
        if parsed.query or parsed.fragment or not _VISIBLE.fullmatch(url):
            raise ValueError
    return urls


def _header_value(key: SecretStr) -> SecretStr:
    if not _VISIBLE.fullmatch(key.get_secret_value()):
        raise ValueError
    return key


def _sentry_dsn(dsn: SecretStr) -> SecretStr:
    parsed = urlsplit(_http_url(dsn.get_secret_value()))
    if not parsed.username or not parsed.path.rpartition("/")[2].isdecimal():
        raise ValueError
    return dsn


Switch = Annotated[bool, Field(description="true or false")]
Name = Annotated[str, Field(description="a name")]
Threads = Annotated[int, integer(1, 1024)]
Replicas = Annotated[int, integer(1, 64)]
QueueLength = Annotated[int, integer(1, 10_000)]
Seconds = Annotated[float, Field(ge=0, le=3600, description="seconds from 0 to 3600")]
Timeout = Annotated[float, Field(gt=0, le=3600, description="seconds, above 0 up to 3600")]
Temperature = Annotated[
    float, Field(ge=0, le=2, allow_inf_nan=False, description="a number from 0 (greedy) to 2")
]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")]
ApiKeys = Annotated[
    tuple[ApiKey, ...], BeforeValidator(parse_api_keys), Field(description=KEYS_DESCRIPTION)
]
HostNames = Annotated[
    tuple[str, ...],
    BeforeValidator(_split),
    AfterValidator(_allowed_hosts),
    Field(
        description="host names such as desk.example or *.desk.example, separated by commas, or *"
    ),
]
Origins = Annotated[
    tuple[str, ...],
    BeforeValidator(_split),
    AfterValidator(_origins),
    Field(description="origins such as https://desk.example, separated by commas, or *"),
]
RedisUrl = Annotated[
    SecretStr,
    AfterValidator(_redis_url),
    Field(
        description="a redis://, rediss://, unix:// or redis+sentinel:// URL with the options of "
        "docs/events.md, or memory://"
    ),
]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
ServerUrls = Annotated[
    tuple[SecretStr, ...],
    BeforeValidator(_split),
    AfterValidator(_server_urls),
    Field(description="URLs such as http://gpu-1:8000/v1, separated by commas"),
]
ServerKey = Annotated[SecretStr, AfterValidator(_header_value)]
SentryDsn = Annotated[
    SecretStr, AfterValidator(_sentry_dsn), Field(description="https://KEY@HOST/PROJECT")
]
