"""Both ways of paging for the conformance tests of HVM vCPUs."""

from __future__ import annotations

import pytest

from tests.unit.vcpu.shadow_guest import ShadowGuest


@pytest.fixture(params=["hap", "shadow"])
def paging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module's `HvmGuest` has two-level paging, or shadow page tables."""
    if request.param == "shadow":
        monkeypatch.setattr(request.module, "HvmGuest", ShadowGuest)
    return str(request.param)
