"""Per-vCPU state of a PV domain that the hardware does not hold: what Xen keeps in `struct pv_vcpu` and `struct vcpu`."""

from __future__ import annotations

from typing import Final, NamedTuple

from bus.abi.vcpu import RUNSTATE_offline
from bus.addresses import Mfn

CR0_TS: Final = 1 << 3
CR0_BASE: Final = 0x80050033
"""CR0 of a PV guest without TS: PG, AM, WP, NE, ET, MP, PE. Only TS is the guest's to change."""
CR4_BASE: Final = 0x0620
"""CR4 as the guest sees it at start: PAE, OSFXSR, OSXMMEXCPT."""
CR4_GUEST_MASK: Final = 0x1000C
"""CR4 bits that the guest may change: TSD (2), DE (3), FSGSBASE (16)."""
DR6_DEFAULT: Final = 0xFFFF0FF0
DR7_DEFAULT: Final = 0x00000400
DEFAULT_PERIOD_NS: Final = 10_000_000
"""PV guests begin with a 100 Hz ticker, as on Xen."""


class InitialRegisters(NamedTuple):
    """What a vCPU starts with, from its vcpu_guest_context; loaded when it first runs."""

    gpr: tuple[int, ...]
    """RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15."""
    rip: int
    rflags: int
    cs: int
    ss: int
    ds: int
    es: int
    fs: int
    gs: int
    fs_base: int
    gs_base_kernel: int
    gs_base_user: int
    extended: bytes | None
    """FXSAVE image; None: the reset state."""


class VcpuState:
    """One vCPU. Plain data; `info` is the byte index of its vcpu_info in the domain's own memory (`GuestFrames.octets`)."""

    __slots__ = (
        "blocked", "context", "cr0", "cr2", "cr4", "dr", "dr6", "dr7", "dr7_io", "event_callback", "failsafe_callback",
        "failsafe_masks", "gdt_entries", "gdt_frames", "id", "info", "info_registered", "initial", "initialised", "iobmp", "iobmp_limit", "iopl", "kernel_mode",
        "kernel_root", "kernel_sp", "kernel_ss", "misc_features", "nmi_masked", "nmi_pending", "online",
        "periodic_next", "periodic_period", "poll_deadline", "poll_ports", "runstate", "runstate_area",
        "runstate_entry", "runstate_time", "segment_failure", "singleshot", "syscall32_callback",
        "syscall32_masks", "syscall_callback", "syscall_masks", "sysenter_callback", "sysenter_masks", "time_area",
        "timer_port", "trap_address", "trap_cs", "trap_flags", "tsc_aux", "user_root",
    )  # fmt: skip

    def __init__(self, vcpu_id: int) -> None:
        self.id: Final = vcpu_id
        self.initial: InitialRegisters | None = None
        self.context: bytes | None = None
        """`Vcpu.save_context` of a vCPU that has run and is not the current one."""
        # Virtual IDT: entry point, TI flags (DPL in bits 0-1, bit 2: mask events), code selector.
        self.trap_address = [0] * 256
        self.trap_flags = [0] * 256
        self.trap_cs = [0] * 256
        # Callbacks (0: none) and whether each masks events while it runs.
        self.event_callback = 0
        self.failsafe_callback = 0
        self.failsafe_masks = False
        self.syscall_callback = 0
        self.syscall_masks = False
        self.syscall32_callback = 0
        self.syscall32_masks = False
        self.sysenter_callback = 0
        self.sysenter_masks = False
        self.kernel_ss = 0
        self.kernel_sp = 0
        # Mode and address space.
        self.kernel_mode = True
        self.kernel_root = Mfn(0)
        self.user_root: Mfn | None = None
        self.gdt_frames: tuple[int, ...] = ()
        self.gdt_entries = 0
        # Virtualised control and debug registers.
        self.cr0 = CR0_BASE
        self.cr2 = 0
        self.cr4 = CR4_BASE
        self.dr = [0, 0, 0, 0]
        self.dr6 = DR6_DEFAULT
        self.dr7 = DR7_DEFAULT
        self.dr7_io = 0
        self.iopl = 0
        """In place in RFLAGS: bits 12 and 13."""
        self.iobmp = 0
        self.iobmp_limit = 0
        self.misc_features = 0
        """MSR_INTEL_MISC_FEATURES_ENABLES: bit 0, CPUID faulting."""
        self.tsc_aux = 0
        self.nmi_pending = False
        self.nmi_masked = False
        self.segment_failure = False
        """A selector could not be reloaded when the vCPU was switched in: the failsafe callback is due."""
        # vcpu_info.
        self.info = -1
        self.info_registered = False
        # Scheduling.
        self.initialised = False
        self.online = False
        self.blocked = False
        self.poll_ports: tuple[int, ...] | None = None
        """While in SCHEDOP_poll: the ports waited for."""
        self.poll_deadline: int | None = None
        # Time.
        self.singleshot: int | None = None
        """Absolute system time, ns."""
        self.periodic_period = DEFAULT_PERIOD_NS
        self.periodic_next = 0
        """Absolute system time, ns; 0: the ticker starts its first period when it is next looked at."""
        self.timer_port = 0
        """Port that VIRQ_TIMER of this vCPU is bound to; 0: none."""
        self.runstate = RUNSTATE_offline
        self.runstate_entry = 0
        self.runstate_time = [0, 0, 0, 0]
        self.runstate_area = 0
        self.time_area = 0

    def wake(self) -> None:
        """Out of SCHEDOP_block or SCHEDOP_poll."""
        self.blocked = False
        self.poll_ports = None
        self.poll_deadline = None

    @property
    def runnable(self) -> bool:
        """Up and not blocked."""
        return self.online and not self.blocked

    def deadline(self) -> int | None:
        """Absolute system time (ns) of the next timer that matters to anybody; None if there is none.

        The periodic ticker counts only while VIRQ_TIMER is bound: nobody would see the tick.
        """
        single = self.singleshot
        poll = self.poll_deadline
        if poll is not None and (single is None or poll < single):
            single = poll
        if self.periodic_period and self.timer_port and (single is None or self.periodic_next < single):
            return self.periodic_next
        return single
