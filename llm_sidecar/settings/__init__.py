"""The configuration of the sidecar: one frozen object, in groups.

    settings = Settings.from_environ()
    settings.limits.queue_length

    Settings(models={"phi3_path": path}, events={"url": "memory://"})  # without an environment

Only this package reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from llm_sidecar.settings.base import Group
from llm_sidecar.settings.groups import (
    DEFAULT_HERMES,
    DEFAULT_LANCEDB_URI,
    DEFAULT_PHI3,
    Access,
    Database,
    Events,
    Limits,
    Models,
    Proposals,
    Speech,
    Telemetry,
)

__all__ = [
    "DEFAULT_HERMES",
    "DEFAULT_LANCEDB_URI",
    "DEFAULT_PHI3",
    "Database",
    "Settings",
    "default_max_chars",
]


class Settings(BaseModel):
    """The configuration of one sidecar. docs/configuration.md is generated from its groups."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Models = Field(default_factory=Models)
    proposals: Proposals = Field(default_factory=Proposals)
    limits: Limits = Field(default_factory=Limits)
    access: Access = Field(default_factory=Access)
    database: Database = Field(default_factory=Database)
    events: Events = Field(default_factory=Events)
    speech: Speech = Field(default_factory=Speech)
    telemetry: Telemetry = Field(default_factory=Telemetry)

    @classmethod
    def groups(cls) -> dict[str, type[Group]]:
        """The class of each group, by the group's name."""
        return {name: field.annotation for name, field in cls.model_fields.items()}  # type: ignore[misc]

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Reads all variables of `environ` (default: this process's environment).

        An empty variable counts as unset.

        Raises:
            SettingsError: one line that names the first bad variable, its value and what it takes.
        """
        return cls(**{name: group.from_environ(environ) for name, group in cls.groups().items()})


def default_max_chars(environ: Mapping[str, str] | None = None) -> int:
    """`MAX_PROMPT_CHARS`, for scripts: no other variable is validated.

    Raises:
        SettingsError: it is not valid.
    """
    source = os.environ if environ is None else environ
    variable = str(Limits.model_fields["max_prompt_chars"].alias)
    given = {variable: source[variable]} if variable in source else {}
    return Limits.from_environ(given).max_prompt_chars
