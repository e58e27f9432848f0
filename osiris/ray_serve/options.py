"""The options of the application on Ray Serve."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm_sidecar.errors import SettingsError
from llm_sidecar.event_bus.redis_url import MEMORY
from llm_sidecar.settings import Settings


class Options(BaseModel):
    """How many replicas there are, and what each of them gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phi3_min: int = Field(1, ge=1, description="replicas of Phi-3 at least")
    phi3_max: int = Field(0, ge=0, description="and at most; 0: always as many")
    hermes_min: int = Field(1, ge=1, description="replicas of Hermes at least")
    hermes_max: int = Field(0, ge=0, description="and at most; 0: always as many")
    sidecars: int = Field(1, ge=1, description="replicas of the API")
    cpus: int = Field(1, ge=1, description="CPU threads of each replica of a model")
    gpus: float = Field(0.0, ge=0.0, description="GPUs of each replica of a model")
    ongoing: int = Field(
        16, ge=2, description="requests that a replica of a model runs and queues; others wait"
    )
    model: str = Field(
        "osiris.ray_serve.replica:make_model",
        description="the function that makes a model, as module:name",
    )
    release: str = Field("", description="another value restarts all replicas, one after the other")

    @model_validator(mode="after")
    def _at_least_the_minimum(self) -> Self:
        for name in ("phi3", "hermes"):
            least, most = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if 0 < most < least:
                raise ValueError(f"{name}_max is less than {name}_min")
        return self

    @property
    def replicas(self) -> int:
        """The most replicas of all models together."""
        return max(self.phi3_min, self.phi3_max) + max(self.hermes_min, self.hermes_max)

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Adds an option of the command line for each field."""
        for name, field in cls.model_fields.items():
            parser.add_argument(
                "--" + name.replace("_", "-"), metavar="N", default=field.default,
                help=f"{field.description} ({field.default})",
            )  # fmt: skip


def parse(prog: str, argv: Sequence[str] | None) -> tuple[Options, int]:
    """The options and the port of a command line; exits with a sentence if they are not valid."""
    parser = argparse.ArgumentParser(prog, description="Serves the sidecar with Ray, on loopback.")
    parser.add_argument("--port", type=int, default=8000, help="the port of the API (8000)")
    Options.add_to(parser)
    given = vars(parser.parse_args(argv))
    port = given.pop("port")
    try:
        return Options(**given), port
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        parser.error("; ".join(problems))


def check(settings: Settings, options: Options) -> None:
    """Raises SettingsError if the settings do not fit an application on Ray."""
    if settings.models.phi3_urls or settings.models.hermes_urls:
        raise SettingsError(
            "PHI3_URL and HERMES_URL do not go with Ray, whose replicas have the models."
        )
    if options.sidecars > 1 and settings.events.url.get_secret_value().startswith(MEMORY):
        raise SettingsError(
            "With REDIS_URL=memory:// there can be one sidecar only: two would not agree."
        )
