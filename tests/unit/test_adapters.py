"""Finding an adapter by name, by date or as the newest."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from llm_sidecar.errors import AdapterRejected
from llm_sidecar.models import adapters

NO_SUCH_ADAPTER = (
    "There is no such adapter: PHI3_ADAPTER_DIR holds no folder of that name with an "
    "adapter_config.json."
)


def make_adapters(base: Path, *names: str) -> None:
    for name in names:
        (base / name).mkdir()
        (base / name / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("20260102", datetime.date(2026, 1, 2)),
        ("20260102-dpo", datetime.date(2026, 1, 2)),
        ("20240229", datetime.date(2024, 2, 29)),
        ("20260230", None),
        ("20261301", None),
        ("2026-01-02", None),
        ("2026010", None),
        ("120260102", None),
        ("20260102-sft", None),
        ("20260102-dpo2", None),
        ("20260102-DPO", None),
        ("latest", None),
        ("", None),
    ],
)
def test_an_adapters_date_is_that_of_its_name(name: str, date: datetime.date | None) -> None:
    assert adapters.adapter_date(Path("/adapters") / name) == date


# The newest


def test_the_newest_adapter_is_taken(tmp_path: Path) -> None:
    make_adapters(tmp_path, "20260102", "20251231", "20260101-dpo")
    assert adapters.get_latest_adapter_dir(tmp_path) == tmp_path / "20260102"
    make_adapters(tmp_path, "20260103")
    assert adapters.get_latest_adapter_dir(str(tmp_path)) == tmp_path / "20260103"


def test_of_one_date_the_dpo_adapter_is_taken(tmp_path: Path) -> None:
    make_adapters(tmp_path, "20260102-dpo", "20260102")
    assert adapters.get_latest_adapter_dir(tmp_path) == tmp_path / "20260102-dpo"


def test_what_is_no_dated_adapter_is_passed_over(tmp_path: Path) -> None:
    make_adapters(tmp_path, "20260101", "20261399", "latest", "20270101-sft", "120270101")
    (tmp_path / "20280101").mkdir()
    (tmp_path / "20290101").write_text("a file")
    (tmp_path / "20300101" / "adapter_config.json").mkdir(parents=True)
    assert adapters.get_latest_adapter_dir(tmp_path) == tmp_path / "20260101"


def test_no_folder_or_an_empty_one_has_no_adapter(tmp_path: Path) -> None:
    assert adapters.get_latest_adapter_dir(tmp_path) is None
    assert adapters.get_latest_adapter_dir(tmp_path / "nowhere") is None


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    said = f"The adapters cannot be read: {file}: Not a directory; set PHI3_ADAPTER_DIR."
    with pytest.raises(AdapterRejected) as caught:
        adapters.get_latest_adapter_dir(file)
    assert caught.value.detail == said
    with pytest.raises(AdapterRejected) as caught:
        adapters.find_adapter_dir(file, "20260101")
    assert caught.value.detail == said


def test_a_folder_that_cannot_be_looked_into_counts_until_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading it reports why it cannot be read; an older adapter would hide that."""
    make_adapters(tmp_path, "20260101", "20260102")

    def is_file(path: Path) -> bool:
        if "20260102" in path.parts:
            raise OSError("Input/output error")
        return True

    monkeypatch.setattr(Path, "is_file", is_file)
    assert adapters.get_latest_adapter_dir(tmp_path) == tmp_path / "20260102"


# The one that is named


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("20260101", "20260101-dpo"),
        ("20260101-dpo", "20260101-dpo"),
        ("20260102", "20260102"),
        ("20260103", "20260103-dpo"),
    ],
)
def test_a_date_means_its_dpo_adapter_and_a_name_itself(
    tmp_path: Path, name: str, found: str
) -> None:
    make_adapters(tmp_path, "20260101-dpo", "20260101", "20260102", "20260103-dpo", "20260104")
    assert adapters.find_adapter_dir(tmp_path, name) == tmp_path / found


@pytest.mark.parametrize("name", ["20260103", "20260102-dpo", "2026", "", "latest", "20260105"])
def test_an_adapter_that_is_not_there_is_said(tmp_path: Path, name: str) -> None:
    make_adapters(tmp_path, "20260101", "20260101-dpo", "20260102", "latest")
    (tmp_path / "20260105").mkdir()
    with pytest.raises(AdapterRejected) as caught:
        adapters.find_adapter_dir(tmp_path, name)
    # Without the name, which is the caller's.
    assert caught.value.detail == NO_SUCH_ADAPTER


def test_without_a_folder_no_adapter_is_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected) as caught:
        adapters.find_adapter_dir(tmp_path / "nowhere", "20260101")
    assert caught.value.detail == NO_SUCH_ADAPTER
