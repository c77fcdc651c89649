"""The warden of a machine for tests (a program, as `toolstack.warden`) whose devices, or DomIO, are in an attacker's hands."""

from __future__ import annotations

import os
from pathlib import Path

from toolstack.warden import children
from toolstack.warden.__main__ import main

if __name__ == "__main__":
    role = os.environ.get("DOMICILE_HOSTILE_ROLE", "nvme")
    children.MODULES[role] = {"nvme": "tests.support.hostile_device", "domio": "tests.support.hostile_domio"}[
        role
    ]
    plain = children._environment
    children._environment = lambda: {**plain(), "PYTHONPATH": str(Path(__file__).parents[2])}
    main()
