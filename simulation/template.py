"""Worlds that are built once and begun anew for each seed: building the machine and its domains is a fifth of a run, and always the same.

What is kept is the state of the objects (simulation.snapshot). Stacks cannot be kept and need not: when the domains are built, every
simulated process is at the bottom of its reactor's loop, where a new stack begins too."""

from __future__ import annotations

import random
import re
import struct
from typing import Final

from greenlet import greenlet

from bus.abi import hypercalls_model, layout
from bus.log import Logger
from bus.messages.envelope import Message
from simulation.disk import DiskWorld
from simulation.model import DiskModel
from simulation.network import NetWorld
from simulation.plan import Fault, Plan
from simulation.seams import joined
from simulation.snapshot import Snapshot
from simulation.world import ENCODED, World

CONSTANT: Final = (
    *(
        hypercalls_model.Command,
        hypercalls_model.Error,
        hypercalls_model.Hypercall,
        hypercalls_model.ArrayArg,
    ),
    *(layout.Layout, layout.Prim, layout.Bytes, layout._Field, struct.Struct, re.Pattern),
    *(Message, Fault, Plan, Logger, DiskModel, random.Random, greenlet),
)
"""The ABI's tables, messages, and what is set anew for each run (chance, stacks)."""
SCENARIOS: Final[dict[str, type[World]]] = {"disk": DiskWorld, "network": NetWorld}


class Template:
    """A world of one scenario."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self._world: Final = SCENARIOS[plan.scenario](seed, plan)
        machine = self._world.machine
        with joined(machine):
            self._world.build()
        self._snapshot: Final = Snapshot(self._world, constant=CONSTANT)
        machine.close()

    def world(self, seed: int, plan: Plan, *, keep_trace: bool = False) -> World:
        """For a seed that is encoded, or not, as this one's was. The world that was given before is this one: its run must be over."""
        self._snapshot.restore()
        world = self._world
        scheduler = world.machine.scheduler
        for process in world.machine.all_processes:
            scheduler.spawn(process.thread, process.reactor.run)
        world.take(seed, plan, keep_trace=keep_trace)
        return world


_templates: Final[dict[tuple[str, bool], Template]] = {}


def begun(seed: int, plan: Plan, *, keep_trace: bool = False) -> World:
    """A world to run, with all domains built."""
    key = (plan.scenario, seed % ENCODED == 0)
    template = _templates.get(key)
    if template is None:
        template = _templates[key] = Template(seed, plan)
    return template.world(seed, plan, keep_trace=keep_trace)
