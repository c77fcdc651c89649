"""One scenario: the control plane boots, a guest uses its device, things break, and in the end everything must be as promised."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Final

from bus.abi.grant_table import GNTTAB_RESERVED_XENSTORE, GRANT_ENTRY_V1, GTF_permit_access, grant_entry_v1
from bus.abi.hvm.params import HVM_PARAM_STORE_EVTCHN, HVM_PARAM_STORE_PFN
from bus.abi.xen import DOMID_SELF, VIRQ_DOM_EXC
from bus.addresses import DomId, Mfn, Port
from domains.dom0.xc import ControlInterface
from domains.dom0.xenstore_service import XenstoreService
from drivers.xenbus.states import XenbusState
from simulation.guest import Guest
from simulation.machine import Body, Machine
from simulation.plan import Fault, Plan
from simulation.process import SimDomain
from simulation.scheduler import START, Livelock
from simulation.seams import joined

SECTORS: Final = 256
"""Of the disk."""
WHOLE: Final = 8
"""Every so many-th seed is whole: each message goes through its encoding, as on a real link (in the others the validated object is passed
on), the boot's chance is the seed's own, and I/O begins as soon as the guest may. In the others the boot is one of `FAMILIES`, which
those seeds share (simulation.template): it ends when the device is connected and all processes wait; then the seed's chance begins, and I/O."""
FAMILIES: Final = 17
"""Coprime to `WHOLE`: neighbours differ."""
BOOT_LIMIT: Final = 20_000_000_000
FAMILY: Final = 1 << 40
"""Seeds of the shared boots: from here on."""
RUN_LIMIT: Final = 60_000_000_000
"""Nobody may wait longer, whatever breaks (simulated ns)."""


def family_of(seed: int) -> int | None:
    """Whose boot the seed's is; None: it is whole."""
    return seed % FAMILIES if seed % WHOLE else None


@dataclass(slots=True)
class Outcome:
    """What came of one run."""

    seed: int
    plan: Plan
    """With the faults that were drawn."""
    violations: list[str]
    digest: str
    """SHA-256 of the trace."""
    events: int
    simulated_ms: float
    answered: int
    fired: int
    trace: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """A promise was broken."""
        return bool(self.violations)


class World(ABC):
    """A seed and a plan, run once by `run`: Dom0, one driver domain (role `domio`), one guest with one device of it."""

    BACKEND: ClassVar[str]
    """The driver domain's name."""
    KIND: ClassVar[str]
    NUMBER: ClassVar[int]
    """Of the device, as in its paths in xenstore."""

    def __init__(self, seed: int, plan: Plan, *, keep_trace: bool = False) -> None:
        """`plan.random_faults` more faults are drawn from the seed."""
        bodies: dict[str, Body] = {"dom0": self._dom0, "domio": self._domio, "guest": self._guest}
        self.machine: Final = Machine(SECTORS, bodies, encoded=seed % WHOLE == 0)
        self.violations: list[str] = []
        self.backend_id: Final = DomId(1)
        self.guest_id: Final = DomId(2)
        self.back: Final = (
            f"/local/domain/{self.backend_id}/backend/{self.KIND}/{self.guest_id}/{self.NUMBER}"
        )
        self.front: Final = f"/local/domain/{self.guest_id}/device/{self.KIND}/{self.NUMBER}"
        """The device's directories at both ends."""
        self.guest_table = Mfn(0)
        self._ports: dict[DomId, Port] = {}
        """Of the domains' xenstore rings, at their ends."""
        self.front_state = XenbusState.Unknown
        self.guest: Guest | None = None
        self.built = False
        """The domains are there, and paused: what comes before is the same for all seeds, and nothing breaks in it."""
        self.ready = False
        self.rests = False
        """The boot that seeds share is over: the device is connected, and nobody does anything."""
        self.going = False
        """The guest may do I/O."""
        self.guest_rng: Final = random.Random(0)
        self.over = False
        self.guest_killed = False
        self.take(seed, self.drawn(seed, plan), keep_trace=keep_trace)

    @classmethod
    def drawn(cls, seed: int, plan: Plan) -> Plan:
        """The plan with the faults that are drawn from the seed."""
        faults = cls.draw(random.Random(seed), plan.random_faults, plan.operations)
        return plan.model_copy(update={"fault": plan.fault + faults, "random_faults": 0})

    def take(self, seed: int, plan: Plan, *, keep_trace: bool = False) -> None:
        """The seed and the plan (`drawn`) of the run. A world that is built may be given others than it was made with
        (simulation.template)."""
        self.seed = seed
        self.plan = plan
        self.operations = plan.operations
        self._errors = plan.errors_expected
        self.machine.keep_trace = keep_trace

    def violation(self, text: str) -> None:
        """A promise was broken."""
        self.machine.trace(f"VIOLATION {text}")
        if len(self.violations) < 20:
            self.violations.append(text)

    # ------------------------------------------------------------------ Dom0

    def _dom0(self, host: SimDomain) -> None:
        """What domains/dom0/toolstack does, for one driver domain, one device and one guest."""
        store = self.store = XenstoreService(host)
        self.xc = ControlInterface(host)
        host.bind_virq(VIRQ_DOM_EXC, self._check_domains)
        backend_gfns, guest_gfns = self._memory()
        self._build(host, self.backend_id, backend_gfns, self.BACKEND)
        base = f"/local/domain/{self.backend_id}"
        store.mkdir(f"{base}/backend")
        store.permit(f"{base}/backend", f"n{self.backend_id}")
        self._build(host, self.guest_id, guest_gfns, "guest")
        self._hardware(host)
        self.built = True

    def _start(self) -> None:
        """Dom0 goes on: from here on things break."""
        xc = self.xc
        for (
            domid,
            port,
        ) in self._ports.items():  # not before: views of mapped rings are released, and would not be put back
            self.store.introduce(domid, port)
        xc.unpause(self.backend_id)
        self.machine.injector.arm(self.plan.fault)
        self._write_nodes()
        xc.unpause(self.guest_id)
        self.ready = True

    def _build(self, host: SimDomain, domid: DomId, gfns: list[int], name: str) -> None:
        store, xc = self.store, self.xc
        made = xc.create_domain(uuid=bytes(15) + bytes([domid]), max_vcpus=1, ssidref=1)
        if made != domid:
            raise RuntimeError(f"domain {made} instead of {domid}")
        xc.max_vcpus(domid, 1)
        xc.max_mem(domid, (len(gfns) + 8) << 2)
        xc.populate(domid, gfns)
        port = host.alloc_unbound(domid, DOMID_SELF)
        xc.set_hvm_param(domid, HVM_PARAM_STORE_PFN, gfns[-1])
        xc.set_hvm_param(domid, HVM_PARAM_STORE_EVTCHN, port)
        table = xc.grant_table_mfns(domid)[0]
        if domid == self.guest_id:
            self.guest_table = table
        entry = GRANT_ENTRY_V1.pack(grant_entry_v1(GTF_permit_access, 0, gfns[-1]))
        self.machine.memory.write(table, GNTTAB_RESERVED_XENSTORE * GRANT_ENTRY_V1.size, entry)
        base = f"/local/domain/{domid}"
        store.mkdir(base)
        store.permit(base, "n0", f"r{domid}")
        store.write(f"{base}/name", name)
        store.write(f"{base}/domid", str(domid))
        self._ports[domid] = port

    def _write_nodes(self) -> None:
        """The device's directories at both ends, and what is seen of its states."""
        store, back_id, front_id = self.store, self.backend_id, self.guest_id
        back, front = self.back, self.front
        store.mkdir(back)
        store.permit(back, f"n{back_id}", f"r{front_id}")
        store.mkdir(front)
        store.permit(front, f"n{front_id}", f"r{back_id}")
        nodes = [("frontend", front), ("frontend-id", str(front_id)), ("online", "1"), *self._nodes()]
        for name, value in nodes:
            store.write(f"{back}/{name}", value)
        for name, value in [("backend", back), ("backend-id", str(back_id)), ("state", "1")]:
            store.write(f"{front}/{name}", value)
        store.watch(f"{back}/state", lambda _: self._state("back", f"{back}/state"))
        store.watch(f"{front}/state", lambda _: self._state("front", f"{front}/state"))

    def _state(self, which: str, path: str) -> None:
        value = self.store.read(path)
        if value is None:
            return
        self.machine.injector.happen(f"xenbus:{which}:{value}")
        if which == "back" and value == "6" and self.store.read(f"{self.front}/state") == "6":
            self.over = True

    def _check_domains(self) -> None:
        """VIRQ_DOM_EXC. The driver domain is restarted in place; a guest that ended is destroyed."""
        info = self.xc.domain_info(self.backend_id)
        if info is not None and info.flags & 4:
            self.machine.trace(f"dom0 restarts {self.BACKEND}")
            self.xc.resume(self.backend_id)
        info = self.xc.domain_info(self.guest_id)
        if info is not None and info.flags & 4 and not self.guest_killed:
            self.guest_killed = True
            self.machine.trace("dom0 destroys the guest")
            self.xc.destroy(self.guest_id)
            self.store.domain_died(self.guest_id)
            self.store.remove(self.back)
            self.store.remove(self.front)
        if self.guest_killed and self.machine.core.domains.get(self.guest_id) is None:
            self.over = True

    def _guest(self, host: SimDomain) -> None:
        self.guest = self._start_guest(host)

    # ------------------------------------------------------------------ what is different in each scenario

    @staticmethod
    @abstractmethod
    def draw(rng: random.Random, most: int, operations: int) -> tuple[Fault, ...]:
        """Up to `most` faults that the scenario must survive, at times that fit so many operations."""

    @abstractmethod
    def _memory(self) -> tuple[list[int], list[int]]:
        """The frames (gfns) of the driver domain, and of the guest; the last is the page of its xenstore ring."""

    @abstractmethod
    def _hardware(self, host: SimDomain) -> None:
        """Devices of the driver domain."""

    @abstractmethod
    def _nodes(self) -> list[tuple[str, str]]:
        """What else is in the back end's directory."""

    @abstractmethod
    def _domio(self, host: SimDomain) -> None:
        """The driver domain's process."""

    @abstractmethod
    def _start_guest(self, host: SimDomain) -> Guest:
        """The guest's process."""

    def _settled(self) -> list[str]:
        """All is closed and at rest: what else is not as promised."""
        return []

    # ------------------------------------------------------------------ running

    def build(self) -> None:
        """Until all domains are there. RuntimeError if that does not come to an end."""
        scheduler = self.machine.scheduler
        scheduler.run(scheduler.now + BOOT_LIMIT, lambda: self.built)
        if not self.built:
            raise RuntimeError("Dom0 does not build the domains")

    def boot(self) -> None:
        """Until the control plane is up; a boot that seeds share: until all rest."""
        machine, family = self.machine, family_of(self.seed)
        scheduler = machine.scheduler
        self._chance(self.seed if family is None else FAMILY + family)
        self.going = family is None
        machine.processes[DomId(0)].reactor.soon(self._start)
        scheduler.run(scheduler.now + BOOT_LIMIT, lambda: self.ready)
        if not self.ready:
            self.violation("the control plane does not come up")
        elif family is not None:
            scheduler.run(
                scheduler.now + RUN_LIMIT, lambda: self._connected() or self.over or bool(self.violations)
            )
            self.rests = self._connected()

    def _chance(self, seed: int) -> None:
        """From here on chance is this seed's."""
        self.machine.begin(seed)
        self.guest_rng.seed(seed ^ 0x6E57)

    def _connected(self) -> bool:
        """The device is connected, and nobody does anything."""
        return self.front_state is XenbusState.Connected and self.machine.idle()

    def _go(self) -> None:
        """The boot is over: the rest is the seed's own."""
        self._chance(self.seed)
        guest = self.guest
        assert guest is not None
        self.going = True
        guest.host.reactor.soon(guest.go)

    def run(self) -> Outcome:
        """The whole scenario."""
        machine = self.machine
        scheduler = machine.scheduler
        with joined(machine):
            try:
                if not self.built:
                    self.build()
                if not self.rests:
                    self.boot()
                if self.rests:
                    self._go()
                if self.ready:
                    scheduler.run(scheduler.now + RUN_LIMIT, lambda: self.over or bool(self.violations))
                    self._judge()
            except (Livelock, Exception) as error:
                self.violation(f"{type(error).__name__}: {error}"[:300])
            finally:
                machine.close()
        return Outcome(
            self.seed, self.plan, [*self.violations], machine.digest(), scheduler.events,
            (scheduler.now - START) / 1e6, self.answered, len(machine.injector.fired),
            machine.text() if machine.keep_trace else [],
        )  # fmt: skip

    @property
    def answered(self) -> int:
        """The guest's operations that are done."""
        return self.guest.done if self.guest is not None else 0

    def _judge(self) -> None:
        machine, guest = self.machine, self.guest
        if self.violations:
            return
        if not self.over:
            state = self.front_state.name
            if self._errors and state in ("Closing", "Closed"):
                return  # it failed cleanly, as planned
            waits = guest.waits if guest is not None else "the guest has not begun"
            self.violation(f"hang: after {RUN_LIMIT // 1_000_000_000} s {waits} (frontend {state})")
            return
        machine.scheduler.run(machine.now + 1_000_000_000, lambda: False)  # what is under way comes to rest
        for problem in machine.problems():
            self.violation(f"hypervisor: {problem}")
        granter = self.guest_id
        mapped = [m for m in machine.grants.mappings(self.backend_id) if m.granter == granter]
        if mapped:
            self.violation(f"{len(mapped)} grants of the guest are mapped by {self.BACKEND} after close")
        for problem in self._settled():
            self.violation(problem)
