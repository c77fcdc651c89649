"""docs/bus.md is what the models say."""

from __future__ import annotations

from pathlib import Path

from bus.reference import reference


def test_reference_page_is_current() -> None:
    """Whoever changes a message makes the page anew: `python -m bus.reference > docs/bus.md`."""
    page = Path(__file__).parents[3] / "docs" / "bus.md"
    assert page.read_text(encoding="utf-8") == reference()
