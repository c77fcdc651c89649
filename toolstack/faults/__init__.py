"""Fault plans on machines of real processes (docs/faults.md): `Faults`, and `FaultyMachine`, which it acts on."""

from __future__ import annotations

from simulation.live.plan import Fault, What
from toolstack.faults.control import Faults, Struck
from toolstack.faults.machine import FaultyMachine

__all__ = ["Fault", "Faults", "FaultyMachine", "Struck", "What"]
