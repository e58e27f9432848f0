"""The settings of torch reach the models that they are for."""

from __future__ import annotations

import pytest

from llm_sidecar.models.local.model import LocalModel
from llm_sidecar.models.registry import create_models
from llm_sidecar.settings import Settings
from llm_sidecar.telemetry.calls import Observers


@pytest.mark.parametrize(
    ("environ", "phi3", "hermes"),
    [
        ({}, (None, "auto"), ("auto", "auto")),
        (
            {"HERMES_DTYPE": "float32", "PREFILL_DTYPE": "bfloat16"},
            (None, "bfloat16"),
            ("float32", "bfloat16"),
        ),
    ],
)
def test_only_hermes_has_a_dtype_and_both_have_a_prefill_dtype(
    environ: dict[str, str],
    phi3: tuple[str | None, str],
    hermes: tuple[str | None, str],
) -> None:
    models = create_models(Settings.from_environ(environ), Observers(), lambda death: None)
    for model, expected in ((models.phi3, phi3), (models.hermes, hermes)):
        assert isinstance(model, LocalModel)
        options = model._loader.options
        assert (options.dtype, options.prefill_dtype) == expected
