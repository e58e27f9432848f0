"""Checks whether Redis may lose acknowledged writes."""

from __future__ import annotations

import logging
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from llm_sidecar.event_bus.redis_errors import reason

ADVICE: Final = {
    "appendonly": ("yes", "a restart of Redis loses everything"),
    "appendfsync": ("always", "a power failure loses up to a second of events"),
    "maxmemory-policy": ("noeviction", "a full Redis deletes events"),
}
"""The recommended value of each option, and the consequence of any other value."""

log = logging.getLogger(__name__)


async def durability(client: Redis) -> list[str]:
    """One line for each option with which Redis may lose events; each is logged, too.

    Without permission to read the options, it logs that and returns an empty list.
    """
    try:
        options = await _options(client)
    except RedisError as error:
        log.info("it is not known whether Redis keeps its events: %s", reason(error))
        return []
    warnings = [
        f"{name} of Redis is {options[name]}, not {wanted}: {consequence}"
        for name, (wanted, consequence) in ADVICE.items()
        if options.get(name, wanted) != wanted
    ]
    if options.get("appendonly") == "no":
        # Without `appendonly`, `appendfsync` has no effect.
        warnings = [line for line in warnings if not line.startswith("appendfsync")]
    for line in warnings:
        log.warning(line)
    return warnings


async def _options(client: Redis) -> dict[str, Any]:
    options: dict[str, Any] = {}
    try:
        for name in ADVICE:
            found: Any = await client.config_get(name)
            options |= found
    except (NoPermissionError, ResponseError):
        # INFO has fewer of these options, but more users have permission for it.
        info = await client.info("persistence") | await client.info("memory")
        options["appendonly"] = "yes" if info["aof_enabled"] else "no"
        options["maxmemory-policy"] = info["maxmemory_policy"]
    return options
