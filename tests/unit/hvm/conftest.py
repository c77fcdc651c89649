"""Both ways of paging for what runs code of a guest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.unit.hvm import hvm_rig
from tests.unit.hvm.model_rig import Pair


@pytest.fixture(params=["hap", "shadow"])
def paging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with two-level paging, and with shadow page tables."""
    monkeypatch.setattr(hvm_rig, "PAGING", request.param)
    return str(request.param)


@pytest.fixture
def pairs() -> Iterator[Callable[..., Pair]]:
    """`pairs(code, device)`: a guest and its device model, closed at the test's end."""
    made: list[Pair] = []

    def make(*arguments: Any, **more: Any) -> Pair:
        made.append(Pair(*arguments, **more))
        return made[-1]

    yield make
    for pair in made:
        pair.close()
