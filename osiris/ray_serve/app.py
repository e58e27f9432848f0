"""Builds the application: a deployment for each model, and the sidecar in front of them."""

from typing import Any, Final

from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from llm_sidecar.settings import Settings
from osiris.ray_serve.ingress import sidecar
from osiris.ray_serve.options import Options, check
from osiris.ray_serve.replica import ModelDeployment

# Without `from __future__ import annotations`: Ray reads the class of the argument of `build`.

_FURTHER_REQUESTS: Final = 64
"""Probes, and requests that the sidecar refuses itself."""
_STOP_SECONDS: Final = 5.0
"""Seconds for a replica to stop after its last request."""
_DRAIN_POLL: Final = 0.5
_HEALTH_SECONDS: Final = 5.0
_TARGET: Final = 0.6
"""The share of the requests that a replica takes at which Ray starts another one."""


def build(options: Options) -> serve.Application:
    """The application, for `serve.run` and for `import_path` in a configuration of Ray Serve.

    Raises:
        SettingsError: a variable does not fit.
    """
    settings = Settings.from_environ()
    check(settings, options)
    models = [
        _model("phi3", options.phi3_min, options.phi3_max, settings, options),
        _model("hermes", options.hermes_min, options.hermes_max, settings, options),
    ]
    limits = settings.limits
    listeners = settings.events.max_listeners + settings.speech.max_listeners
    api = serve.deployment(
        serve.ingress(sidecar)(),
        name="sidecar",
        num_replicas=options.sidecars,
        max_ongoing_requests=limits.max_concurrent_requests + listeners + _FURTHER_REQUESTS,
        **_common(settings),
    )
    return api.bind(*models)


def _model(
    name: str, least: int, most: int, settings: Settings, options: Options
) -> serve.Application:
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                target_ongoing_requests=options.ongoing * _TARGET,
            )
        }
    deployment = serve.deployment(
        ModelDeployment,
        name=name,
        max_ongoing_requests=options.ongoing,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        **scaling,
        **_common(settings),
    )
    return deployment.bind(name, options.cpus, options.model)


def _common(settings: Settings) -> dict[str, Any]:
    """Options of each deployment: running requests finish before a replica stops."""
    return {
        "graceful_shutdown_timeout_s": settings.limits.request_timeout + _STOP_SECONDS,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL,
        "health_check_period_s": _HEALTH_SECONDS,
        # The sidecar has an access log of its own.
        "logging_config": LoggingConfig(enable_access_log=False),
    }
