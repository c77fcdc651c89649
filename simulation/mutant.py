"""What a deliberately broken copy is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Undo = tuple[type, str, Any]
"""Where a method was replaced, and what was there."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One defect."""

    name: str
    what: str
    bound: int
    """Within so many seeds (0, 1, 2 ...) of its scenario's default plan it is found."""
    patches: Callable[[], list[Undo]]
    """Puts it in."""
    scenario: Literal["disk", "network"] = "disk"


def patched(owner: type, name: str, value: Any) -> list[Undo]:
    """Replace the owner's own attribute."""
    old = owner.__dict__[name]
    setattr(owner, name, value)
    return [(owner, name, old)]
