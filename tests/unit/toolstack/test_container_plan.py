"""Fault plans for machines in containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolstack.demo.faults import MAX_PLAN_BYTES, load
from toolstack.errors import InputError


def test_the_default_plan_is_one() -> None:
    """It kills, freezes, and ends containers."""
    assert {fault.what for fault in load("").fault} == {"kill", "freeze", "end-container"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fault = 3", "fault: "),
        ("", "fault: "),
        ("[[fault]]\nwhat = 'kill'\ntarget = 'domio'\n", "fault.0.at_ms: "),
        ("[[fault]]\nwhat = 'burn'\ntarget = 'domio'\nat_ms = 1\n", "fault.0.what: "),
        ("[[fault]]\nwhat = 'kill'\ntarget = 'hypervisor'\nat_ms = 1\n", "is not replaced when it dies"),
        ("[[fault]]\nwhat = 'kill'\ntarget = 'domu-pv'\nat_ms = 1\n", "the guest that is to survive"),
        ("[[fault]]\nwhat = 'kill'\ntarget = 'a b'\nat_ms = 1\n", "fault.0.target: "),
        ("[[fault]]\nwhat = 'kill'\ntarget = 'domio'\nat_ms = -1\n", "fault.0.at_ms: "),
        ("[[fault]]\nwhat = 'kill'\ntarget = 'domio'\nat_ms = 1\nhow = 1\n", "fault.0.how: "),
        ("[[fault", "(at "),
        ("#" * (MAX_PLAN_BYTES + 1), "longer than"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    """Which names the file and the place."""
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load(str(path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_that_is_not_there() -> None:
    """Is named."""
    with pytest.raises(InputError, match="/nowhere: No such file"):
        load("/nowhere")
