"""One scenario: the control plane boots, a guest uses its disk, things break, and in the end everything must be as promised."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

from bus.abi.grant_table import GNTTAB_RESERVED_XENSTORE, GRANT_ENTRY_V1, GTF_permit_access, grant_entry_v1
from bus.abi.hvm.params import HVM_PARAM_STORE_EVTCHN, HVM_PARAM_STORE_PFN
from bus.abi.xen import DOMID_SELF, VIRQ_DOM_EXC
from bus.addresses import DomId, Mfn
from domains.dom0.xc import ControlInterface
from domains.dom0.xenstore_service import XenstoreService
from domains.domio.__main__ import BOUNCES, DomIo
from domains.domio.vbd import LEDGER_PAGES
from drivers.xenbus.states import XenbusState
from simulation.guest import Guest
from simulation.machine import Body, Machine
from simulation.model import DiskModel
from simulation.plan import Plan, random_faults
from simulation.process import SimDomain
from simulation.scheduler import Livelock
from simulation.seams import joined

SECTORS: Final = 256
BDF: Final = 8
VDEV: Final = 768
GUEST_PAGES: Final = 64
DEVICE_PAGES: Final = 192
"""DomIO's memory for the driver's queues."""
BOOT_LIMIT: Final = 20_000_000_000
RUN_LIMIT: Final = 60_000_000_000
"""Nobody may wait longer, whatever breaks (simulated ns)."""
RESTART_S: Final = 0.05


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


class World:
    """A seed and a plan, run once by `run`."""

    def __init__(self, seed: int, plan: Plan, *, keep_trace: bool = False) -> None:
        """`plan.random_faults` more faults are drawn from the seed."""
        rng = random.Random(seed)
        drawn = random_faults(rng, plan.random_faults)
        self.seed: Final = seed
        self.plan: Final = plan.model_copy(update={"fault": plan.fault + drawn, "random_faults": 0})
        self.operations: Final = plan.operations
        self.sectors: Final = SECTORS
        self.guest_rng: Final = random.Random(seed ^ 0x6E57)
        self.model: Final = DiskModel(SECTORS)
        self.violations: list[str] = []
        self.backend_id = DomId(1)
        self.guest_id = DomId(2)
        self.guest_table = Mfn(0)
        self.front_state = XenbusState.Unknown
        self.guest: Guest | None = None
        self.ready = False
        self.over = False
        self.guest_killed = False
        self._resets = 0
        self._errors = self.plan.errors_expected
        bodies: dict[str, Body] = {"dom0": self._dom0, "domio": self._domio, "guest": self._guest}
        self.machine: Final = Machine(seed, self.plan.fault, SECTORS, bodies)
        self.machine.keep_trace = keep_trace
        self._told: Final = {"flush": 0, "write": 0}
        """Requests of a kind that failed to tell of a power cut."""
        self.machine.on_power_cut.append(self.model.power_cut)

    def violation(self, text: str) -> None:
        """A promise was broken."""
        self.machine.trace(f"VIOLATION {text}")
        if len(self.violations) < 20:
            self.violations.append(text)

    def excused(self, what: str) -> bool:
        """A request failed: whether it may. The plan makes requests fail; or a flush and a write, one each, have to say that a power cut
        undid what was written before."""
        if self._errors:
            return True
        if self._told.get(what, self.model.cuts) >= self.model.cuts:
            return False
        self._told[what] += 1
        return True

    # ------------------------------------------------------------------ Dom0

    def _dom0(self, host: SimDomain) -> None:
        """What domains/dom0/toolstack does, for one driver domain, one disk and one guest."""
        machine = self.machine
        store = self.store = XenstoreService(host)
        xc = self.xc = ControlInterface(host)
        host.bind_virq(VIRQ_DOM_EXC, self._check_domains)
        gfns = [*range(LEDGER_PAGES), BOUNCES[BDF >> 3], *range(BOUNCES.stop, BOUNCES.stop + DEVICE_PAGES)]
        self._build(host, self.backend_id, gfns, "DomIO")
        base = f"/local/domain/{self.backend_id}"
        store.mkdir(f"{base}/backend")
        store.permit(f"{base}/backend", f"n{self.backend_id}")
        self._build(host, self.guest_id, list(range(GUEST_PAGES)), "guest")
        xc.plug(BDF, "nvme", "disk1")
        xc.assign_device(self.backend_id, BDF)
        machine.on_device_ended = lambda bdf: host.reactor.after(
            RESTART_S, lambda: xc.plug(bdf, "nvme", "disk1")
        )
        xc.unpause(self.backend_id)
        machine.injector.arm()
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
        store.introduce(domid, port)

    def _write_nodes(self) -> None:
        back_id, front_id = self.backend_id, self.guest_id
        back = f"/local/domain/{back_id}/backend/vbd/{front_id}/{VDEV}"
        front = f"/local/domain/{front_id}/device/vbd/{VDEV}"
        self._write_pair(back, front, [
            ("frontend", front), ("frontend-id", str(front_id)), ("online", "1"), ("removable", "0"), ("state", "1"),
            ("mode", "w"), ("device-type", "disk"), ("params", f"nvme:{BDF:x}"), ("discard-enable", "1"),
        ])  # fmt: skip

    def _write_pair(self, back: str, front: str, nodes: list[tuple[str, str]]) -> None:
        """A device's directories at both ends, and what is seen of its states."""
        store, back_id, front_id = self.store, self.backend_id, self.guest_id
        self._back, self._front = back, front
        store.mkdir(back)
        store.permit(back, f"n{back_id}", f"r{front_id}")
        store.mkdir(front)
        store.permit(front, f"n{front_id}", f"r{back_id}")
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
        if which == "back" and value == "6" and self.store.read(f"{self._front}/state") == "6":
            self.over = True

    def _check_domains(self) -> None:
        """VIRQ_DOM_EXC. DomIO is restarted in place; a guest that ended is destroyed."""
        info = self.xc.domain_info(self.backend_id)
        if info is not None and info.flags & 4:
            self.machine.trace("dom0 restarts DomIO")
            self.xc.resume(self.backend_id)
        info = self.xc.domain_info(self.guest_id)
        if info is not None and info.flags & 4 and not self.guest_killed:
            self.guest_killed = True
            self.machine.trace("dom0 destroys the guest")
            self.xc.destroy(self.guest_id)
            self.store.domain_died(self.guest_id)
            self.store.remove(self._back)
            self.store.remove(self._front)
        if self.guest_killed and self.machine.core.domains.get(self.guest_id) is None:
            self.over = True

    # ------------------------------------------------------------------ the others

    def _domio(self, host: SimDomain) -> None:
        DomIo(host).start()

    def _guest(self, host: SimDomain) -> None:
        self.guest = Guest(self, host)

    # ------------------------------------------------------------------ running

    def run(self) -> Outcome:
        """The whole scenario."""
        machine = self.machine
        scheduler = machine.scheduler
        start = scheduler.now
        with joined(machine):
            try:
                scheduler.run(start + BOOT_LIMIT, lambda: self.ready)
                if not self.ready:
                    self.violation("the control plane does not come up")
                else:
                    scheduler.run(scheduler.now + RUN_LIMIT, lambda: self.over or bool(self.violations))
                    self._judge()
            except (Livelock, Exception) as error:
                self.violation(f"{type(error).__name__}: {error}"[:300])
            finally:
                machine.close()
        return Outcome(
            self.seed, self.plan, self.violations, machine.digest.hexdigest(), scheduler.events,
            (scheduler.now - start) / 1e6, self.answered, len(machine.injector.fired), machine.lines,
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
            waits = guest.front.pending if guest is not None else 0
            state = self.front_state.name
            if self._errors and state in ("Closing", "Closed"):
                return  # it failed cleanly, as planned
            self.violation(
                f"hang: after {RUN_LIMIT // 1_000_000_000} s {waits} requests wait for an answer (frontend {state})"
            )
            return
        machine.scheduler.run(machine.now + 1_000_000_000, lambda: False)  # what is under way comes to rest
        for problem in machine.problems():
            self.violation(f"hypervisor: {problem}")
        granter = self.guest_id
        mapped = [m for m in machine.grants.mappings(self.backend_id) if m.granter == granter]
        if mapped:
            self.violation(f"{len(mapped)} grants of the guest are mapped by DomIO after close")
        # What a planned refusal kept a successor from taking up is lost with its connection, and the disk is Closed: cleanly failed.
        if not self.guest_killed and not self._errors and guest is not None and guest.front.pending:
            self.violation(f"{guest.front.pending} requests were never answered")
        machine.media.power_cut()
        for problem in self.model.check_medium(machine.media.stable):
            self.violation(problem)
