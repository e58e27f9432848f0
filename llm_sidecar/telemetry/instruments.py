"""Traces, Sentry and profiling, each only if the settings ask for it.

telemetry = build(settings)
telemetry.install(app)
telemetry.start()
sidecar = Sidecar(settings, telemetry=telemetry)
...
await telemetry.close()
"""

from __future__ import annotations

from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.base import Instrument, Instruments


def build(settings: Settings) -> Instrument:
    """The instruments that the settings ask for; imports no others, and connects to nothing."""
    instruments: list[Instrument] = []
    if settings.telemetry.profiling:
        from llm_sidecar.telemetry.profiling import Profiling

        instruments.append(Profiling())
    if settings.telemetry.otel_endpoint is not None:
        from llm_sidecar.telemetry.traces import Traces

        instruments.append(
            Traces(settings.telemetry.otel_endpoint, settings.telemetry.otel_service_name)
        )
    if dsn := settings.telemetry.sentry_dsn.get_secret_value():
        from llm_sidecar.telemetry.sentry import Sentry

        instruments.append(
            Sentry(dsn, settings.telemetry.sentry_env, settings.telemetry.sentry_traces_sample_rate)
        )
    return Instruments(instruments)
