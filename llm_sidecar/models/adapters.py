"""Finds dated LoRA adapters in a folder."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Final

from llm_sidecar.errors import AdapterRejected

_ADAPTER_NAME: Final = re.compile(r"([0-9]{8})(-dpo)?")


def get_latest_adapter_dir(base_path: Path | str) -> Path | None:
    """The newest dated adapter.

    Args:
        base_path: folder of adapters.

    Returns:
        The newest `YYYYMMDD` or `YYYYMMDD-dpo` folder that holds an `adapter_config.json`, the
        `-dpo` one of two with the same date; None if there are none.

    Raises:
        AdapterRejected: the folder cannot be read.
    """
    return max(_adapters(base_path), default=(None, None, None))[2]


def list_adapter_dirs(base_path: Path | str) -> list[Path]:
    """The folders of all dated adapters, oldest first.

    Raises:
        AdapterRejected: the folder cannot be read.
    """
    return [folder for _, _, folder in sorted(_adapters(base_path))]


def find_adapter_dir(base_path: Path | str, name: str) -> Path:
    """The adapter with this name; for a plain date, its `-dpo` adapter if there is one.

    Args:
        base_path: folder of adapters.
        name: `YYYYMMDD` or `YYYYMMDD-dpo`.

    Raises:
        AdapterRejected: there is none, or the folder cannot be read.
    """
    found = [a for a in _adapters(base_path) if a[1] == name or a[1].partition("-")[0] == name]
    if not found:
        raise AdapterRejected(
            "There is no such adapter: PHI3_ADAPTER_DIR holds no folder of that name with an "
            "adapter_config.json."
        )
    return max(found)[2]


def _adapters(base_path: Path | str) -> list[tuple[datetime.date, str, Path]]:
    """(date, name, folder) of each dated adapter."""
    base = Path(base_path)
    try:
        dated = [(adapter_date(path), path.name, path) for path in base.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AdapterRejected(
            f"The adapters cannot be read: {base}: {error.strerror}; set PHI3_ADAPTER_DIR."
        ) from None
    return [
        (date, name, path) for date, name, path in dated if date is not None and holds_adapter(path)
    ]


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter; True if it cannot be read, because loading then reports
    why.

    Symbolic links are followed, also out of the folder of adapters: operators keep adapters on
    other disks, and no client sees the target of a link.
    """
    try:
        return (folder / "adapter_config.json").is_file()
    except OSError:
        return True


def adapter_date(folder: Path) -> datetime.date | None:
    """The date in an adapter folder's name; None if the name is not a date."""
    match = _ADAPTER_NAME.fullmatch(folder.name)
    if match is None:
        return None
    try:
        return datetime.date.fromisoformat(match[1])
    except ValueError:
        return None
