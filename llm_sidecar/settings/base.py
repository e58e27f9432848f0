"""A group of settings, and how it reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from llm_sidecar.errors import SettingsError


class Group(BaseSettings):
    """A group of related settings.

    A field's alias is the environment variable, its description says which values it takes, and
    the string below it what it means.
    """

    model_config = SettingsConfigDict(
        frozen=True, validate_by_name=True, validate_by_alias=True, validate_default=False
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only `from_environ` reads the environment; the constructor takes its arguments alone."""
        return (init_settings,)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Reads the group's variables of `environ` (default: this process's environment).

        An empty variable counts as unset.

        Raises:
            SettingsError: one line that names the first bad variable, its value and what it takes.
        """
        source = _Variables(cls, os.environ if environ is None else environ)
        try:
            return cls(_build_sources=((source,), {}))
        except ValidationError as error:
            variable = error.errors()[0]["loc"][0]
            field = next(field for field in cls.model_fields.values() if field.alias == variable)
            # A Redis URL may hold a password.
            is_secret = any(kind in str(field.annotation) for kind in ("SecretStr", "ApiKey"))
            value = "***" if is_secret else repr(source()[str(variable)])
            raise SettingsError(
                f"{variable}={value} is not valid: it takes {field.description}"
            ) from None


class _Variables(PydanticBaseSettingsSource):
    """The variables of a mapping that are not empty. Their names are case-sensitive."""

    def __init__(self, group: type[Group], environ: Mapping[str, str]) -> None:
        super().__init__(group)
        self._environ = environ

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[str | None, str, bool]:
        variable = str(field.alias)
        return self._environ.get(variable) or None, variable, False

    def __call__(self) -> dict[str, Any]:
        fields = self.settings_cls.model_fields.items()
        found = [self.get_field_value(field, name) for name, field in fields]
        return {variable: value for value, variable, _ in found if value is not None}
