"""The warden of a machine for tests (a program, as `toolstack.warden`) whose devices, or DomIO, are in an attacker's hands."""

from __future__ import annotations

import os
from pathlib import Path

from toolstack.warden import warden
from toolstack.warden.__main__ import main

if __name__ == "__main__":
    role = os.environ.get("DOMICILE_HOSTILE_ROLE", "nvme")
    warden.MODULES[role] = {"nvme": "tests.support.hostile_device", "domio": "tests.support.hostile_domio"}[
        role
    ]
    plain = warden._environment
    warden._environment = lambda: {**plain(), "PYTHONPATH": str(Path(__file__).parents[2])}
    main()
