"""What leaves the guest: ports, memory that is no RAM, CPUID, MSRs, hypercalls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from bus.abi.errno import XEN_EPERM
from domains.hvm.compat import CompatCalls
from domains.hvm.cpu import HvmCpu
from domains.hvm.cpuid import HvmCpuid
from domains.hvm.interrupts import Interrupts
from domains.hvm.lapic import APIC_BASE, PAGE
from domains.hvm.msr import CPUID_FAULTING, MsrFault, Msrs
from domains.hvm.state import HvmState
from domains.pv.api import Continuation
from domains.pv.calls import MASK64, NoResult
from domains.pv.hypercalls import Hypercalls
from domains.vcpu.hvm_thunks import HF_CS64
from drivers.pc.bus import MmioSpace

GP: Final = 13
DEBUG_PORT: Final = 0xE9
MAX_LINE: Final = 200
PIC_PORTS: Final = frozenset((0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1))
"""A write there may change the vector that the 8259 pair has for the processor."""
M32: Final = 0xFFFFFFFF
T = TypeVar("T")
ONES: Final = {1: 0xFF, 2: 0xFFFF, 4: M32, 8: MASK64}


class Ports(Protocol):
    """I/O ports."""

    def read(self, port: int, size: int) -> int:
        """IN."""

    def write(self, port: int, size: int, value: int) -> None:
        """OUT."""


class Spaces(Protocol):
    """Where ports, and memory that is no RAM, are answered."""

    @property
    def ports(self) -> Ports:
        """I/O ports."""

    @property
    def mmio(self) -> MmioSpace:
        """Guest-physical addresses."""


class Exits:
    """Implements `domains.vcpu.hvm_api.HvmExits`. `counts` says how often each kind happened."""

    def __init__(
        self,
        cpu: HvmCpu,
        calls: Hypercalls,
        interrupts: Interrupts,
        now: Callable[[], int],
        log: Callable[[str], None],
    ) -> None:
        self._cpu: Final = cpu
        self.calls: Final = calls
        self._compat: Final = CompatCalls(cpu, calls)
        self._interrupts: Final = interrupts
        self._now: Final = now
        self._log: Final = log
        self._line = bytearray()
        self.cpuid: HvmCpuid | None = None
        self.msrs: Msrs | None = None
        self.guest32: Callable[[bool], None] = lambda on: None
        """Told whether the hypercall that begins is from 32-bit code."""
        self.board: Spaces | None = None
        """Of a full HVM guest, or of a PVH guest that has devices."""
        self.counts: Final[Counter[str]] = Counter()

    def _current(self) -> HvmState:
        state = self._cpu.current
        assert isinstance(state, HvmState)
        return state

    # --- ports and memory

    def on_port_in(self, port: int, size: int) -> int:
        """Nothing is there; Xen's debug port names itself."""
        self.counts["in"] += 1
        board = self.board
        if board is not None:
            state: Any = self._cpu.current
            if state.armed is not None:
                self._interrupts.settle(state)
            value = board.ports.read(port, size)
            if self._interrupts.changed:
                self._interrupts.arm(state)
            return value
        return DEBUG_PORT if port == DEBUG_PORT else ONES[size]

    def on_port_out(self, port: int, size: int, value: int) -> None:
        """Xen's debug port makes lines of the log."""
        self.counts["out"] += 1
        board = self.board
        if board is not None:
            state: Any = self._cpu.current
            if state.armed is not None:
                self._interrupts.settle(state)
            if port in PIC_PORTS:
                self._interrupts.follow_upcall()
                self._interrupts.changed = True
            board.ports.write(port, size, value)
            if self._interrupts.changed:
                self._interrupts.arm(state)
            return
        if port != DEBUG_PORT:
            return
        byte = value & 0xFF
        if byte != 10:
            self._line.append(byte if 32 <= byte < 127 or byte == 9 else 63)
        if byte == 10 or len(self._line) >= MAX_LINE:
            self._log(self._line.decode("ascii"))
            self._line.clear()

    def around(self, access: Callable[[], T]) -> T:
        """An access that is made for the vCPU elsewhere: what it took before is settled, what comes of the access is asked for."""
        state = self._current()
        self._interrupts.settle(state)
        value = access()
        if self._interrupts.changed:
            self._interrupts.arm(state)
        return value

    def _apic_offset(self, address: int) -> int | None:
        apic = self._current().apic
        if APIC_BASE <= address < APIC_BASE + PAGE and apic.hardware_enabled and not apic.x2apic:
            return address - APIC_BASE
        return None

    def on_mmio_read(self, address: int, size: int) -> int:
        """The local APIC's page; ones elsewhere."""
        self.counts["mmio read"] += 1
        offset = self._apic_offset(address)
        state = self._current()
        if offset is None:
            if self.board is None:
                return ONES.get(size, MASK64)
            self._interrupts.settle(state)
            value = self.board.mmio.read(address, size)
            self._interrupts.arm(state)
            return value
        self._interrupts.settle(state)
        value = state.apic.read(offset & ~0xF)
        return value >> 8 * (offset & 3) if offset & 0xC == 0 else 0

    def on_mmio_write(self, address: int, size: int, value: int) -> None:
        """The local APIC's page; dropped elsewhere."""
        self.counts["mmio write"] += 1
        offset = self._apic_offset(address)
        state = self._current()
        if offset is None and self.board is not None:
            self._interrupts.settle(state)
            self.board.mmio.write(address, size, value)
            self._interrupts.arm(state)
            return
        if offset is None or offset & 0xF or size != 4:
            return
        self._interrupts.settle(state)
        state.apic.write(offset, value)
        self._interrupts.arm(state)

    # --- instructions

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """The policy."""
        self.counts["cpuid"] += 1
        if self._cpu.current.misc_features & CPUID_FAULTING and self._cpu.hvm.regs.cpl:
            self._cpu.hvm.raise_fault(GP)
        assert self.cpuid is not None
        return self.cpuid.query(leaf, subleaf, self._cpu.current.id)

    def on_rdmsr(self, index: int) -> int:
        """#GP for unknown ones."""
        self.counts["rdmsr"] += 1
        assert self.msrs is not None
        state = self._current()
        self._interrupts.settle(state)
        try:
            return self.msrs.read(state, index)
        except MsrFault:
            self._cpu.hvm.raise_fault(GP)

    def on_wrmsr(self, index: int, value: int) -> None:
        """#GP for unknown ones and bad values."""
        self.counts["wrmsr"] += 1
        assert self.msrs is not None
        state = self._current()
        self._interrupts.settle(state)
        try:
            self.msrs.write(state, index, value)
        except MsrFault:
            self._cpu.hvm.raise_fault(GP)
        self._interrupts.arm(state)

    def on_rdtsc(self) -> int:
        """Only while the TSC is trapped."""
        return self._now()

    def on_cr_write(self, register: int, value: int) -> int:
        """Of CR4: #GP for a bit of a feature that the guest is not shown, which the vCPU itself would take."""
        self.counts[f"cr{register}"] += 1
        if register != 4:
            return value
        assert self.cpuid is not None
        if value & ~self.cpuid.cr4_bits():
            self._cpu.hvm.raise_fault(GP)
        return value

    def on_cr8_read(self) -> int:
        """The upper half of the local APIC's task priority."""
        self.counts["cr8"] += 1
        return self._current().apic.tpr >> 4

    def on_cr8_write(self, priority: int) -> None:
        """The same; what it lets through now is taken."""
        self.counts["cr8"] += 1
        state = self._current()
        self._interrupts.settle(state)
        state.apic.tpr = priority << 4
        self._interrupts.arm(state)

    def on_invlpg(self, address: int) -> None:
        """Not asked for."""

    # --- hypercalls

    def on_hypercall(self) -> None:
        """From CPL 0 only: -EPERM elsewhere. 64-bit code has its arguments in RDI, RSI, RDX, R10, R8, 32-bit code in EBX, ECX,
        EDX, ESI, EDI; the number is in RAX, and so is the result."""
        self.counts["hypercall"] += 1
        cpu = self._cpu
        r = cpu.hvm.regs
        if r.cpl:
            r.rax = -XEN_EPERM & MASK64
            return
        state = self._current()
        self._interrupts.settle(state)
        if r.hflags & HF_CS64:
            arguments = (r.rdi, r.rsi, r.rdx, r.r10, r.r8)
            rc = self.calls.call(r.rax & M32, *arguments)
            while isinstance(rc, Continuation):
                arguments = (rc.args + arguments[len(rc.args) :])[:5]  # type: ignore[assignment]  # five again
                rc = self.calls.call(r.rax & M32, *arguments)
            if not isinstance(rc, NoResult):
                r.rax = rc & MASK64
        else:
            self.guest32(True)
            a1, a2, a3, a4, a5 = (value & M32 for value in (r.rbx, r.rcx, r.rdx, r.rsi, r.rdi))
            rc = self._compat.call(r.rax & M32, a1, a2, a3, a4, a5)
            self.guest32(False)
            if isinstance(rc, int):
                r.rax = rc & M32
        self._interrupts.arm(state)
