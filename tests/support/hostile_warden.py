"""The warden of a machine for tests (a program, as `toolstack.warden`): some guests' processes are `tests.support.hostile`.

The product has no such way in: this program puts another module in the warden's table.
"""

from __future__ import annotations

from pathlib import Path

from toolstack.warden import warden
from toolstack.warden.__main__ import main

if __name__ == "__main__":
    warden.MODULES["domu"] = "tests.support.hostile"
    plain = warden._environment
    warden._environment = lambda: {**plain(), "PYTHONPATH": str(Path(__file__).parents[2])}
    main()
