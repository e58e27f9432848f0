"""The replicas of a model behind a handle of Ray Serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from llm_sidecar.errors import ModelUnavailable
from llm_sidecar.models.failover import ReplicaLost
from llm_sidecar.models.ray.fleet import Replicas

APP: Final = "osiris"
"""The name of the application."""


class RayReplicas(Replicas):
    """The replicas of the deployment with the model's name."""

    def __init__(self, name: str) -> None:
        """Connects in a replica of the same application; asks nobody yet."""
        self._name = name
        self._handle = serve.get_deployment_handle(name, APP)

    async def answer(self, call: bytes) -> AsyncGenerator[bytes, None]:
        """The answers of one replica; see `Replicas.answer`."""
        answers = self._handle.options(stream=True, method_name="answer").remote(call)
        ended = False
        try:
            async for answer in answers:
                yield answer
            ended = True
        except DeploymentUnavailableError:
            raise self._unavailable() from None
        except (RayError, RayServeException):
            # It has died, or is being stopped by force.
            raise ReplicaLost(
                f"A replica of {self._name} ended while it answered; try again.", retry_after=1
            ) from None
        finally:
            if not ended:
                answers.cancel()

    async def obey(self, order: bytes, seconds: float) -> list[bytes]:
        """The replies of all replicas; see `Replicas.obey`."""
        try:
            replies = self._handle.broadcast("obey", order)
            results = await replies.results_async(timeout_s=seconds, return_exceptions=True)
        except DeploymentUnavailableError:
            raise self._unavailable() from None
        bodies = [result for result in results if isinstance(result, bytes)]
        if not bodies:
            raise self._unavailable()
        return bodies

    def _unavailable(self) -> ModelUnavailable:
        return ModelUnavailable(f"No replica of {self._name} is running.", retry_after=5)
