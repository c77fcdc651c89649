"""A machine whose processes have observers at their edges, and its plan."""

from __future__ import annotations

from typing import Any

from toolstack.faults.control import Faults
from toolstack.machine import Machine


class FaultyMachine(Machine):
    """As `Machine`; `faults` is its plan. Link faults that lose notifications need `doorbells=False`."""

    def __init__(self, name: str = "", **more: Any) -> None:
        """Starts it."""
        self.faults = Faults()
        try:
            super().__init__(
                name, warden="toolstack.faults.warden", environment=self.faults.environment, **more
            )
        except BaseException:
            self.faults.close()
            raise

    def close(self) -> None:
        """Take it down: what is frozen goes on first, or nobody would end."""
        faults = getattr(self, "faults", None)
        if faults is not None:
            faults.thaw()
        super().close()
        if faults is not None:
            faults.close()
            del self.faults
