"""The processor that the vCPUs of a PV domain take turns on, as the hypervisor side sees it: the current vCPU, its registers,
its mode (guest kernel or guest user, both at CPL3), its page-table roots, its view of memory, and the end of the domain.

It is the `PagingHost` of the memory-management code.
"""

from __future__ import annotations

from typing import Final

from bus.abi.arch_x86_64 import FLAT_RING3_CS64, FLAT_RING3_SS64
from bus.addresses import PAGE_SHIFT, MachineAddr, Mfn, VcpuId
from domains.pv.api import PagingApi
from domains.pv.debugreg import DR7_ACTIVE_MASK
from domains.pv.state import CR0_TS, InitialRegisters, VcpuState
from domains.vcpu.api import PvVcpu, Registers

CR4_HARDWARE: Final = 0x10620
"""CR4 that the guest's code really runs with: PAE, OSFXSR, OSXMMEXCPT, FSGSBASE."""
GDT_LIMIT: Final = 0xEFFF
"""Limit of every GDT: the guest's 14 pages and Xen's own descriptors behind them."""
CR0_HARDWARE: Final = 0x80050033
FLAT_LIMIT: Final = 0xFFFFFFFF
CODE64_ATTRIBUTES: Final = 0xA0FB
DATA_ATTRIBUTES: Final = 0xC0F3
LDT_ATTRIBUTES: Final = 0x82
LDT_SELECTOR: Final = 0xE040
"""Any that is not null: the guest cannot see it."""
ATTRIBUTE_L: Final = 1 << 13
ATTRIBUTE_G: Final = 1 << 15
XEN_DESCRIPTORS: Final = {
    0xE023 >> 3: 0x00CFFB000000FFFF,
    0xE02B >> 3: 0x00CFF3000000FFFF,
    0xE033 >> 3: 0x00AFFB000000FFFF,
}
"""Xen's own flat descriptors (FLAT_RING3_CS32, _DS32/_SS32, _CS64), by index."""
RESET_EXTENDED: Final = (
    (0x37F).to_bytes(2, "little") + bytes(22) + (0x1F80).to_bytes(4, "little") + bytes(484)
)
"""FXSAVE image after FNINIT and with MXCSR's reset value."""
EFER_HARDWARE: Final = 0xD01
"""NXE, LMA, LME, SCE."""
RFLAGS_FIXED: Final = 0x202
"""Guest code always runs with IF set (its own IF is the upcall mask) and IOPL 0."""
RFLAGS_DROP: Final = 0x23000
"""IOPL and VM never reach the hardware."""


class Cpu:
    """See the module. `mmu`, and `vcpu` by `attach`, are set once those exist: each needs this object first."""

    __slots__ = (
        "assists",
        "base",
        "compat",
        "crash_reason",
        "current",
        "mmu",
        "octets",
        "regs",
        "stale_step",
        "vcpu",
        "words",
        "yielded",
    )

    mmu: PagingApi
    vcpu: PvVcpu
    regs: Registers

    def __init__(self, base: Mfn, octets: memoryview, words: memoryview, first: VcpuState) -> None:
        self.base: Final = base
        self.octets: Final = octets
        self.words: Final = words
        self.current = first
        self.compat = False
        """The guest's shared info has the 32-bit layout, and so have its run-state areas: of an HVM guest (latched when it makes its
        hypercall page)."""
        self.assists = 0
        """Bitmap of VMASST_TYPE_* that are on, of the whole domain."""
        self.crash_reason: str | None = None
        self.stale_step = False
        """HYPERVISOR_iret set TF. The processor looks at TF behind the SYSCALL of that hypercall as well, and gives a #DB there that the
        guest must not see: its first step is the instruction that it goes on with."""
        self.yielded = False
        """The current vCPU made SCHEDOP_yield in this slice."""

    def attach(self, vcpu: PvVcpu) -> None:
        """The vCPU object, which is built around the traps and so comes last."""
        self.vcpu = vcpu
        self.regs = vcpu.regs

    # --- the end

    def crash(self, reason: str) -> None:
        """Crash the domain (domain_crash): the vCPU stops before its next block. The first reason stays."""
        if self.crash_reason is None:
            self.crash_reason = reason
        self.vcpu.request_stop()

    # --- PagingHost

    def flush_tlb(self) -> None:
        self.vcpu.flush_tlb()

    def flush_page(self, address: int) -> None:
        """INVLPG of the current vCPU."""
        self.vcpu.flush_page(address)

    def drop_code(self, mfn: Mfn) -> None:
        self.vcpu.drop_code(MachineAddr(mfn << PAGE_SHIFT), 1 << PAGE_SHIFT)

    def load_cr3(self, kernel: Mfn, user: Mfn | None) -> None:
        s = self.current
        s.kernel_root = kernel
        s.user_root = user
        root = kernel if s.kernel_mode else user
        if root is not None:
            self.regs.cr3 = root << PAGE_SHIFT
        self.vcpu.flush_tlb()

    def current_roots(self) -> tuple[Mfn, Mfn | None]:
        return self.current.kernel_root, self.current.user_root

    def is_kernel_mode(self) -> bool:
        return self.current.kernel_mode

    def current_vcpu(self) -> VcpuId:
        return VcpuId(self.current.id)

    def descriptor_tables_changed(self, vcpu: VcpuId) -> None:
        if vcpu == self.current.id:
            self.load_descriptor_tables()

    def load_descriptor_tables(self) -> None:
        """Point GDTR and LDTR at the current vCPU's tables in Xen's area."""
        vcpu = VcpuId(self.current.id)
        mmu = self.mmu
        r = self.regs
        r.gdtr_base = mmu.gdt_base(vcpu)
        r.gdtr_limit = GDT_LIMIT
        entries = mmu.ldt_entries(vcpu)
        if entries:
            self.vcpu.load_segment("ldtr", LDT_SELECTOR, mmu.ldt_base(vcpu), entries * 8 - 1, LDT_ATTRIBUTES)
        else:
            self.vcpu.load_segment("ldtr", 0, 0, 0, 0)

    # --- mode

    def toggle_mode(self) -> None:
        """Guest user to guest kernel or back: other root, other GS base. The caller knows that a user root exists."""
        s = self.current
        r = self.regs
        active = r.gs_base
        r.gs_base = r.kernel_gs_base
        r.kernel_gs_base = active
        if s.kernel_mode:
            s.kernel_mode = False
            r.cr3 = (s.user_root or 0) << PAGE_SHIFT
        else:
            s.kernel_mode = True
            r.cr3 = s.kernel_root << PAGE_SHIFT
        self.vcpu.flush_tlb()

    # --- descriptors

    def descriptor(self, selector: int) -> int | None:
        """The 8 bytes that a selector names: in the guest's GDT frames, or one of Xen's flat ones. None: null selector, beyond
        the limit, or in the LDT (whose descriptors the processor reads for itself; see `load_stack_and_code`)."""
        index = selector >> 3
        if selector & 4 or index == 0:
            return None
        s = self.current
        if index < s.gdt_entries:
            frame = s.gdt_frames[index >> 9]
            return int(self.words[(frame - self.base << 9) + (index & 511)])
        return XEN_DESCRIPTORS.get(index)

    def code64(self, selector: int) -> bool:
        """The selector names 64-bit ring-3 code."""
        if selector == FLAT_RING3_CS64:
            return True
        descriptor = self.descriptor(selector)
        return descriptor is not None and descriptor >> 40 & 0x20F8 == 0x20F8

    def enter_flat(self) -> None:
        """CS and SS of the guest kernel: flat, 64-bit."""
        r = self.regs
        if r.cs != FLAT_RING3_CS64 and not self.code64(r.cs):
            self.vcpu.load_segment("cs", FLAT_RING3_CS64, 0, FLAT_LIMIT, CODE64_ATTRIBUTES)
        r.cs = FLAT_RING3_CS64
        r.ss = FLAT_RING3_SS64

    def load_stack_and_code(self, cs: int, ss: int) -> int | None:
        """Load CS and SS as IRET to ring 3 does. None: done. Else the selector (error code of #GP) that is refused.

        Segments in the LDT are refused: an LDT selector cannot be used for CS or SS through this hypercall.
        """
        r = self.regs
        if not (ss == FLAT_RING3_SS64 or self._stack_ok(ss)):
            return ss & 0xFFFC
        old = r.cs
        if cs == FLAT_RING3_CS64 and (old == FLAT_RING3_CS64 or self.code64(old)):
            r.cs = cs
            r.ss = ss
            return None
        descriptor = self.descriptor(cs)
        if descriptor is None:
            return cs & 0xFFFC
        attributes = descriptor >> 40 & 0xF0FF
        if not self._code_ok(attributes):
            return cs & 0xFFFC
        r.ss = ss
        if attributes & ATTRIBUTE_L and (old == FLAT_RING3_CS64 or self.code64(old)):
            r.cs = cs
        else:
            base = descriptor >> 16 & 0xFFFFFF | descriptor >> 56 << 24
            limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
            if attributes & ATTRIBUTE_G:
                limit = limit << 12 | 0xFFF
            self.vcpu.load_segment("cs", cs, base, limit, attributes)
        return None

    def _stack_ok(self, ss: int) -> bool:
        descriptor = self.descriptor(ss)
        # Present, DPL 3, data, writable.
        return descriptor is not None and descriptor >> 40 & 0xFA == 0xF2

    @staticmethod
    def _code_ok(attributes: int) -> bool:
        # Present, code, not both 64-bit and default 32-bit; DPL 3 unless conforming.
        if attributes & 0x98 != 0x98 or attributes & 0x6000 == 0x6000:
            return False
        return attributes & 0x60 == 0x60 or bool(attributes & 4)

    # --- vCPU switch

    def debugreg_changed(self) -> None:
        """The guest wrote a debug register: before its next block the vCPU stops, and `arm_breakpoints` is called."""
        if self.current.dr7 & DR7_ACTIVE_MASK or self.vcpu.breakpoints_armed:
            self.vcpu.request_stop()

    def arm_breakpoints(self) -> None:
        """Give the current vCPU's debug registers to the processor. Between runs."""
        s = self.current
        if s.dr7 & DR7_ACTIVE_MASK or self.vcpu.breakpoints_armed:
            self.vcpu.set_breakpoints(s.dr, s.dr7)

    def switch_out(self) -> None:
        """Put the current vCPU's state away. Between runs."""
        if self.vcpu.breakpoints_armed:
            self.vcpu.set_breakpoints((0, 0, 0, 0), 0)
        self.current.context = self.vcpu.save_context()

    def switch_in(self, state: VcpuState) -> None:
        """Make `state` the current vCPU, in its address space. Between runs."""
        self.current = state
        if state.initial is not None:
            self._load_initial(state, state.initial)
            state.initial = None
        elif state.context is not None:
            self.vcpu.load_context(state.context)
            state.context = None
        root = state.kernel_root if state.kernel_mode else state.user_root
        self.regs.cr3 = (root or 0) << PAGE_SHIFT
        self.apply_ts()
        self.apply_cr4()
        self.load_descriptor_tables()
        self.vcpu.flush_tlb()

    def _load_initial(self, state: VcpuState, initial: InitialRegisters) -> None:
        r = self.regs
        for index, value in enumerate(initial.gpr):
            r.set_gpr(index, value)
        r.rip = initial.rip
        r.rflags = (initial.rflags & ~RFLAGS_DROP) | RFLAGS_FIXED
        if self.load_stack_and_code(initial.cs, initial.ss) is not None:
            self.enter_flat()
        for name, selector in (
            ("ds", initial.ds),
            ("es", initial.es),
            ("fs", initial.fs),
            ("gs", initial.gs),
        ):
            if not self._load_data_segment(name, selector):
                state.segment_failure = True
        r.fs_base = initial.fs_base
        kernel, user = initial.gs_base_kernel, initial.gs_base_user
        r.gs_base, r.kernel_gs_base = (kernel, user) if state.kernel_mode else (user, kernel)
        self.vcpu.load_extended(initial.extended if initial.extended is not None else RESET_EXTENDED)

    def _load_data_segment(self, name: str, selector: int) -> bool:
        """False: the selector is not usable, and null was loaded instead."""
        descriptor = self.descriptor(selector)
        # Present, S, DPL 3; a data segment or readable code.
        if descriptor is not None and descriptor >> 40 & 0xF0 == 0xF0 and descriptor >> 40 & 0xA != 8:
            base = descriptor >> 16 & 0xFFFFFF | descriptor >> 56 << 24
            self.vcpu.load_segment(name, selector | 3, base, FLAT_LIMIT, descriptor >> 40 & 0xF0FF)
            return True
        self.vcpu.load_segment(name, selector & 3 if selector < 4 else 0, 0, FLAT_LIMIT, DATA_ATTRIBUTES)
        return selector < 4

    def apply_cr4(self) -> None:
        """Give the hardware the guest's bits of CR4: TSD traps RDTSC (in the guest kernel too, for which it is emulated), and
        RDFSBASE and its like are #UD without FSGSBASE."""
        self.regs.cr4 = self.current.cr4

    def apply_ts(self) -> None:
        """Give the hardware the guest's CR0.TS."""
        r = self.regs
        wanted = CR0_HARDWARE | (self.current.cr0 & CR0_TS)
        if r.cr0 != wanted:
            r.cr0 = wanted
            # Loading a segment recomputes what the processor derives from CR0.
            self.vcpu.load_segment("ss", r.ss, 0, FLAT_LIMIT, DATA_ATTRIBUTES)
