"""Both ways of paging for what runs code of a guest."""

from __future__ import annotations

import hvm_rig
import pytest


@pytest.fixture(params=["hap", "shadow"])
def paging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with two-level paging, and with shadow page tables."""
    monkeypatch.setattr(hvm_rig, "PAGING", request.param)
    return str(request.param)
