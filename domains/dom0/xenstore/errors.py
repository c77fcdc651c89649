"""xenstored's errors: names, as they travel in a reply of type XS_ERROR."""

from __future__ import annotations

from typing import Final


class XsError(Exception):
    """A request is refused. `name` is one of `drivers.xenbus.wire.ERROR_NAMES`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name: Final = name


class DumpError(ValueError):
    """A state dump is damaged or of a version that this program does not know."""
