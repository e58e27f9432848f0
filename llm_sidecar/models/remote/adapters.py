"""LoRA adapters on a server: https://docs.vllm.ai/en/latest/features/lora.html."""

from __future__ import annotations

import secrets
from typing import Final, NamedTuple

from llm_sidecar.deadline import Deadline
from llm_sidecar.errors import AdapterRejected, InvalidRequest, ModelUnavailable, SidecarError
from llm_sidecar.models.base import Adapter
from llm_sidecar.models.remote.connection import Connection
from llm_sidecar.models.remote.refusals import Refused

_LOAD_SECONDS: Final = 60.0
_UNLOAD_SECONDS: Final = 10.0
"""Time limit for unloading all unused adapters."""


class LoadedAdapter(NamedTuple):
    """An adapter on a server, and its name there."""

    adapter: Adapter
    served_name: str


class ServerAdapters:
    """The adapters that a server has loaded.

    Attributes:
        in_use: the adapter of new requests.
    """

    def __init__(self, connection: Connection) -> None:
        self.in_use: LoadedAdapter | None = None
        self._connection = connection
        self._previous: str | None = None
        # The names of all adapters that the server may have loaded, oldest first.
        self._served_names: dict[str, None] = {}

    async def load(self, adapter: Adapter | None, *, can_load: bool) -> LoadedAdapter | None:
        """Loads an adapter; call `use` to serve requests with it, or else `unload_unused`.

        Args:
            can_load: whether the server has the paths for it.

        Raises:
            AdapterRejected: it cannot be loaded.
            ModelUnavailable: the server does not answer in time.
            QueueFull
        """
        if adapter is None:
            return None
        if not can_load:
            raise AdapterRejected(
                f"{self._connection.name} loads no adapters; vLLM does with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
            )
        # Never reuse a name: vLLM would use the states of the earlier adapter.
        name = f"{adapter.name}-{secrets.token_hex(4)}"
        body = {"lora_name": name, "lora_path": str(adapter.folder)}
        # The server may load it even if its answer is late or lost.
        self._served_names[name] = None
        try:
            await self._connection.post("/load_lora_adapter", body, Deadline.after(_LOAD_SECONDS))
        except TimeoutError:
            raise ModelUnavailable(
                f"{self._connection.name} did not load the adapter within {_LOAD_SECONDS:g} s.",
                retry_after=5,
            ) from None
        except (InvalidRequest, ModelUnavailable) as error:
            if isinstance(error, InvalidRequest | Refused):
                self._served_names.pop(name, None)
            raise AdapterRejected(
                f"The adapter cannot be loaded: {error.detail} The server must have the folder "
                f"{adapter.folder} under the same path."
            ) from None
        return LoadedAdapter(adapter, name)

    def use(self, adapter: LoadedAdapter | None) -> None:
        """Serves new requests with this adapter."""
        if self.in_use is not None:
            self._previous = self.in_use.served_name
        self.in_use = adapter

    async def reset(self) -> None:
        """Uses no adapter, and unloads all that the server may still have after an outage."""
        self.in_use = self._previous = None
        await self.unload_unused()

    async def unload_unused(self) -> None:
        """Unloads all adapters but the one in use and the one before, which running requests may
        still use. An adapter that cannot be unloaded now is unloaded by a later call."""
        used = None if self.in_use is None else self.in_use.served_name
        deadline = Deadline.after(_UNLOAD_SECONDS)
        for name in list(self._served_names):
            if name in (used, self._previous):
                continue
            try:
                await self._connection.post("/unload_lora_adapter", {"lora_name": name}, deadline)
            except (InvalidRequest, Refused):
                # The server does not have it.
                pass
            except (SidecarError, TimeoutError):
                continue
            self._served_names.pop(name, None)
