"""The names under which clients ask for a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_sidecar.errors import NotFound
from llm_sidecar.models.base import Adapter, Models, ModelStatus
from llm_sidecar.models.fake import FakeModel
from llm_sidecar.services.served_models import ServedModel, ServedModels


@pytest.fixture
def models() -> Models:
    phi3 = FakeModel()
    phi3.state = ModelStatus(adapter=Adapter(Path("/adapters/20260102")))
    return Models(phi3, FakeModel())


def test_a_model_is_found_by_its_name(models: Models, tmp_path: Path) -> None:
    served = ServedModels(models, tmp_path)
    assert served.find("hermes") is models.hermes
    assert served.find("phi3") is models.phi3
    assert served.find("phi3:20260102") is models.phi3


@pytest.mark.parametrize("name", ["", "gpt-4", "phi3:", "hermes:20260102", "PHI3", "phi"])
def test_an_unknown_name_is_not_found(models: Models, tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound, match="there is no such model; GET /v1/models lists them"):
        ServedModels(models, tmp_path).find(name)


def test_an_adapter_that_is_not_in_use_is_not_found(models: Models, tmp_path: Path) -> None:
    served = ServedModels(models, tmp_path)
    with pytest.raises(NotFound, match="not in use or does not exist; GET /v1/models"):
        served.find("phi3:20260102-dpo")
    served.check_adapter("phi3", None)
    served.check_adapter("phi3:20260102", "20260102")
    with pytest.raises(NotFound, match="not in use"):
        served.check_adapter("phi3:20260102", None)


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    for name in ("20260101", "20260102", "20260102-dpo", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
        os.utime(tmp_path / name, (7, 7))
    return tmp_path


async def test_the_list_has_the_adapters_newest_first(models: Models, adapter_dir: Path) -> None:
    served = ServedModels(models, adapter_dir)
    adapters = [
        ServedModel(f"phi3:{name}", 7, "phi3") for name in ("20260102-dpo", "20260102", "20260101")
    ]
    assert await served.list() == [ServedModel("phi3"), ServedModel("hermes"), *adapters]
    assert await served.get("phi3:20260101") == adapters[-1]
    with pytest.raises(NotFound):
        await served.get("phi3:other")


async def test_a_folder_that_cannot_be_read_hides_no_model_and_is_logged(
    models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert await ServedModels(models, file).list() == [ServedModel("phi3"), ServedModel("hermes")]
    assert [record.getMessage() for record in caplog.records] == [
        "the list of models has no adapters: The adapters cannot be read: "
        f"{file}: Not a directory; set PHI3_ADAPTER_DIR."
    ]
