"""The table of docs/faults.md, from the record of a run of the chaos tests."""

from __future__ import annotations

import json

from tests.support.chaos import table


def test_a_place_that_was_struck_twice_is_one_entry() -> None:
    """With its worst time; another outcome is another row, so that none hides behind the next."""
    cells = [
        ("domio", "kill", "front 1", "ACK", 2.83), ("domio", "kill", "front 1", "ACK", 9.0), ("domio", "kill", "back 1", "ACK", 5.2),
        ("domio", "kill", "back 2", "FAIL", 1.0),
    ]  # fmt: skip
    lines = [
        json.dumps(dict(zip(("target", "what", "place", "outcome", "seconds"), cell, strict=True)))
        for cell in cells
    ]
    assert table(lines).splitlines()[2:] == [
        "| domio | kill | back 1 (5.2), front 1 (9.0 of 2) | ACK |",
        "| domio | kill | back 2 (1.0) | FAIL |",
    ]
