"""Worlds that are built once and begun anew for each seed: building the machine and its domains is always the same, and a boot that seeds
share (simulation.world.WHOLE) is run once for all of them whose faults come later.

What is kept is the state of the objects (simulation.snapshot). Stacks cannot be kept and need not: when the domains are built, and when all
rest, every simulated process is at the bottom of its reactor's loop, where a new stack begins too. The trace of a seed is the same whether
its boot was run or put back."""

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
from simulation.injector import MS
from simulation.model import DiskModel
from simulation.mutants import applied
from simulation.network import NetWorld
from simulation.order import KINDS
from simulation.plan import Fault, Plan
from simulation.seams import joined
from simulation.snapshot import Snapshot
from simulation.world import WHOLE, World, family_of

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


class Boot:
    """One that seeds share, as it ended, and what was seen until then."""

    def __init__(self, world: World) -> None:
        injector = world.machine.injector
        self.snapshot: Final = Snapshot(world, constant=CONSTANT)
        self._counts: Final = injector.counts.copy()
        self._lasted: Final = injector.armed_for

    def precedes(self, faults: tuple[Fault, ...]) -> bool:
        """Whether each of these strikes later. Messages of links were not counted."""
        return all(
            fault.n > self._counts[fault.event] and fault.event.partition(":")[0] not in KINDS
            if fault.at_ms is None
            else int(fault.at_ms * MS) > self._lasted
            for fault in faults
        )


class Template:
    """A world of one scenario, with all domains built, and what its boots lead to."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self._world: Final = SCENARIOS[plan.scenario](seed, plan)
        machine = self._world.machine
        with joined(machine):
            self._world.build()
        self._built: Final = Snapshot(self._world, constant=CONSTANT)
        machine.close()
        self._mutant = ""
        self._boots: Final[dict[int, Boot | None]] = {}
        """Of that mutant, by family; None: it was run once, and perhaps nobody wants it again."""

    def world(self, seed: int, plan: Plan, mutant: str, *, keep_trace: bool) -> World:
        """For a seed that is whole, or not, as this one's was; the plan with its draws. The world that was given before is this one: its
        run must be over."""
        boot = None if keep_trace else self._boot(seed, plan, mutant)  # a kept boot has no lines for a reader
        if boot is None or not boot.precedes(plan.fault):
            return self._begin(self._built, seed, plan, keep_trace=keep_trace)
        world = self._begin(boot.snapshot, seed, plan)
        world.machine.injector.add(plan.fault)
        return world

    def _begin(self, snapshot: Snapshot, seed: int, plan: Plan, *, keep_trace: bool = False) -> World:
        snapshot.restore()
        world = self._world
        scheduler = world.machine.scheduler
        for process in world.machine.all_processes:
            scheduler.spawn(process.thread, process.reactor.run)
        world.take(seed, plan, keep_trace=keep_trace)
        return world

    def _boot(self, seed: int, plan: Plan, mutant: str) -> Boot | None:
        """The seed's, if it is shared, and was wanted before. None: run it."""
        family = family_of(seed)
        if family is None:
            return None
        if mutant != self._mutant:
            self._boots.clear()
            self._mutant = mutant
        if family not in self._boots:
            self._boots[family] = None
            return None
        boot = self._boots[family]
        if boot is None:
            world = self._begin(self._built, seed, plan.model_copy(update={"fault": ()}))
            machine = world.machine
            with joined(machine), applied(mutant):
                world.boot()
                if world.rests:
                    boot = self._boots[family] = Boot(world)
                machine.close()
        return boot


_templates: Final[dict[tuple[str, bool], Template]] = {}


def begun(seed: int, plan: Plan, *, mutant: str = "", keep_trace: bool = False) -> World:
    """A world to run with that mutant: all domains are built (without it), or the boot is over (it was run with it)."""
    key = (plan.scenario, seed % WHOLE == 0)
    template = _templates.get(key)
    if template is None:
        template = _templates[key] = Template(seed, plan)
    return template.world(seed, SCENARIOS[plan.scenario].drawn(seed, plan), mutant, keep_trace=keep_trace)
