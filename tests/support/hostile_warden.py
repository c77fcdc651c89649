"""The warden of a machine for tests (a program, as `toolstack.warden`): some guests' processes are `tests.support.hostile`.

The product has no such way in: this program puts another module in the warden's table.
"""

from __future__ import annotations

from pathlib import Path

from toolstack.warden import children
from toolstack.warden.__main__ import main

if __name__ == "__main__":
    children.MODULES["domu"] = "tests.support.hostile"
    plain = children._environment
    children._environment = lambda: {**plain(), "PYTHONPATH": str(Path(__file__).parents[2])}
    main()
