"""Domain records, the table of them, and who may act on whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from errno import EEXIST, EINVAL, ENOMEM, EPERM, ESRCH

from bus.abi.xen import DOMID_FIRST_RESERVED
from bus.abi.xen import DOMID_SELF as _DOMID_SELF
from bus.addresses import DomId, Mfn
from hypervisor.core.config import MachineConfig
from hypervisor.core.errors import XenError
from hypervisor.core.p2m import P2m

DOMID_SELF = DomId(_DOMID_SELF)


class Kind(Enum):
    """What runs in a domain's process. The value is what its `configure` order says."""

    PV = "pv"
    HVM = "hvm"
    """Fully virtualized, PVH included."""
    NATIVE = "native"
    """A program of the project's own, auto-translated like a PVH guest (Dom0, DomIO, device models)."""


class Shutdown(IntEnum):
    """SHUTDOWN_* of sched.h. A guest may give any 8-bit code; these are the ones with a meaning."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


def shutdown_name(code: int) -> str:
    """A shutdown code in words."""
    try:
        return Shutdown(code).name.lower()
    except ValueError:
        return f"code {code}"


class Dying(IntEnum):
    """`is_dying` of Xen's struct domain."""

    ALIVE = 0
    DYING = 1
    """Being destroyed: nothing new can be bound, granted or allocated."""
    DEAD = 2
    """All is given back but frames that others still refer to."""


DRIVER_GUEST = 4
ROLES = {
    0: (None, "domu"),
    1: (Kind.NATIVE, "domio"),
    2: (Kind.NATIVE, "dm"),
    3: (Kind.NATIVE, "netio"),
    DRIVER_GUEST: (Kind.PV, "domu"),
}
"""By the security label of XEN_DOMCTL_createdomain (`ssidref`), which on Xen too says what a domain is for:
0, an
ordinary guest, PV or HVM by the flags; 1, the native driver domain of the disks; 2, a device model; 3, the one of the network; 4, a
driver domain that is a PV guest."""


@dataclass(frozen=True, slots=True)
class DomainSpec:
    """What a new domain is to be (the arguments of XEN_DOMCTL_createdomain, and what that cannot say)."""

    kind: Kind
    domid: int = 0
    """0 or >= DOMID_FIRST_RESERVED: choose one."""
    role: str = "domu"
    """Which program its process runs: dom0, domio, netio, dm, domu."""
    handle: bytes = bytes(16)
    max_vcpus: int = 1
    max_evtchn_port: int = 0x7FFFFFFF
    max_grant_frames: int = -1
    max_maptrack_frames: int = -1
    max_grant_version: int = 2
    flags: int = 0
    """XEN_DOMCTL_CDF_*."""
    ssidref: int = 0
    emulation_flags: int = 0
    misc_flags: int = 0
    privileged: bool = False


@dataclass(slots=True)
class VcpuState:
    """What the hypervisor knows of a vCPU."""

    index: int
    initialised: bool = False
    online: bool = False
    """Not VPF_down."""
    blocked: bool = False
    running: bool = False
    cpu_time: int = 0
    """Nanoseconds on a physical CPU; the scheduler counts them."""
    pcpu: int = 0
    affinity_hard: int = -1
    affinity_soft: int = -1
    """Bitmaps of physical CPUs; -1: all."""


@dataclass(slots=True)
class Domain:
    """One domain."""

    domid: DomId
    spec: DomainSpec
    builder: DomId | None
    """The domain that created it and may map its memory."""
    handle: bytes
    vcpus: list[VcpuState] = field(default_factory=list)
    """Empty until XEN_DOMCTL_max_vcpus."""
    max_pages: int = 0
    shared_info: Mfn | None = None
    p2m: P2m | None = None
    """Of an auto-translated domain only."""
    controller_pause: int = 1
    """Pauses by the control domain that are not undone (a new domain is paused once)."""
    internal_pause: int = 0
    """Pauses by the hypervisor itself."""
    started: bool = False
    """Unpaused at least once: its process has the `start` order."""
    shutting_down: bool = False
    shut_down: bool = False
    shutdown_code: int | None = None
    dying: Dying = Dying.ALIVE
    process_alive: bool = False
    life: int = 0
    """Counts its processes: what one of them asked is not answered to the next."""
    target: DomId | None = None
    """A device model's guest, over which it has privilege (XEN_DOMCTL_set_target)."""
    target_of: set[DomId] = field(default_factory=set)
    address_size: int = 64
    time_offset: int = 0
    virq_handler_of: set[int] = field(default_factory=set)
    memory_map: bytes = b""
    """XENMEM_set_memory_map's entries, 20 bytes each."""
    crash_reason: str = ""

    @property
    def kind(self) -> Kind:
        return self.spec.kind

    @property
    def privileged(self) -> bool:
        return self.spec.privileged

    @property
    def restartable(self) -> bool:
        """Its process may be replaced by another while all else of the domain stays: a native domain, or a driver domain that is a guest
        (whose builder then gives vCPU 0 its first state again)."""
        return self.kind is Kind.NATIVE or self.spec.ssidref == DRIVER_GUEST

    @property
    def serves(self) -> bool:
        """Others depend on it although it owns no device: the driver domain of the network."""
        return self.spec.role == "netio"

    @property
    def translated(self) -> bool:
        """paging_mode_translate: the guest uses gfns, Xen keeps the p2m."""
        return self.p2m is not None

    @property
    def paused(self) -> bool:
        return bool(self.controller_pause or self.internal_pause)

    @property
    def runnable(self) -> bool:
        """Its vCPUs may get time on a physical CPU."""
        return (
            self.started
            and not self.paused
            and not self.shutting_down
            and self.dying is Dying.ALIVE
            and self.process_alive
        )

    def vcpu(self, index: int) -> VcpuState | None:
        """The vCPU of that number, if it was allocated."""
        return self.vcpus[index] if 0 <= index < len(self.vcpus) else None


class DomainTable:
    """All domains, by id."""

    def __init__(self, config: MachineConfig) -> None:
        self._config = config
        self._domains: dict[DomId, Domain] = {}
        self._last = 0

    def __iter__(self) -> Iterator[Domain]:
        """By domid."""
        return iter([self._domains[d] for d in sorted(self._domains)])

    def __len__(self) -> int:
        return len(self._domains)

    def get(self, domid: int) -> Domain | None:
        """The domain of that id, dying ones included."""
        return self._domains.get(DomId(domid))

    def choose_domid(self, wanted: int) -> DomId:
        """The id for a new domain. EEXIST if the wanted one is taken, ENOMEM if the machine is full."""
        if len(self._domains) >= self._config.max_domains:
            raise XenError(ENOMEM, "too many domains")
        if 0 < wanted < DOMID_FIRST_RESERVED:
            if wanted in self._domains:
                raise XenError(EEXIST)
            return DomId(wanted)
        candidate = self._last
        while True:  # ends: fewer domains than ids
            candidate = candidate + 1 if candidate + 1 < DOMID_FIRST_RESERVED else 1
            if candidate not in self._domains:
                self._last = candidate
                return DomId(candidate)

    def add(self, domain: Domain) -> None:
        """Enter a new domain."""
        self._domains[domain.domid] = domain

    def remove(self, domid: DomId) -> None:
        """The last of it is gone: its id may be used again."""
        del self._domains[domid]

    @property
    def control(self) -> Domain | None:
        """Dom0."""
        return self._domains.get(DomId(0))

    # -- looking up by a call's argument ---------------------------------------------------------------------

    def by_id(self, caller: Domain, domid: int) -> Domain:
        """DOMID_SELF or any domain's id; ESRCH if there is none, or it is dead."""
        if domid == DOMID_SELF:
            return caller
        domain = self._domains.get(DomId(domid))
        if domain is None or domain.dying is Dying.DEAD:
            raise XenError(ESRCH)
        return domain

    def target(self, caller: Domain, domid: int) -> Domain:
        """As `by_id`, for an act on that domain: EPERM unless it is the caller itself, the caller is
        privileged, or it is the caller's target (XSM_TARGET)."""
        domain = self.by_id(caller, domid)
        if not may_target(caller, domain):
            raise XenError(EPERM)
        return domain

    def remote(self, caller: Domain, domid: int) -> Domain:
        """A domain other than the caller (DOMID_SELF is refused with ESRCH): ESRCH, or EPERM as in
        `target`."""
        domain = self._domains.get(DomId(domid))
        if domain is None or domain.dying is Dying.DEAD:
            raise XenError(ESRCH)
        if domain is caller:
            raise XenError(EINVAL)
        if not may_target(caller, domain):
            raise XenError(EPERM)
        return domain


def may_target(caller: Domain, domain: Domain) -> bool:
    """XSM_TARGET of the dummy policy."""
    return domain is caller or caller.privileged or caller.target == domain.domid
