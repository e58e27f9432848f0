"""Replaces the random seed of requests by a known one."""

from __future__ import annotations

import secrets

import pytest

from tests.unit.services.samples import SEED


@pytest.fixture(autouse=True)
def known_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request with a temperature gets `SEED`."""
    monkeypatch.setattr(secrets, "randbits", lambda bits: SEED if bits == 32 else None)
