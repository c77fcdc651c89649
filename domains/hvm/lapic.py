"""A local APIC: xAPIC registers at its page, x2APIC registers as MSRs, priorities, timer, interprocessor interrupts.

Without I/O: time comes in, interprocessor interrupts go out through `send`. As Xen's virtual one: version 0x14, six local
vectors, a bus clock of 10 ns; no EOI broadcast suppression, no TSC deadline. Source: Intel SDM volume 3, chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

APIC_BASE: Final = 0xFEE00000
PAGE: Final = 0x1000
VERSION: Final = 0x00050014
BUS_NS: Final = 10
ID, LVR, TPR, APR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR2 = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x330, 0x340, 0x350, 0x360, 0x370
TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE, SELF_IPI = 0x380, 0x390, 0x3E0, 0x3F0
MASKED: Final = 1 << 16
PERIODIC: Final = 1 << 17
ENABLED: Final = 1 << 8
LVT_WRITABLE: Final = {
    LVT_TIMER: 0x300FF, LVT_THERMAL: 0x107FF, LVT_PERF: 0x107FF, LVT_LINT0: 0x1A7FF, LVT_LINT1: 0x1A7FF, LVT_ERROR: 0x100FF,
}  # fmt: skip
ESR_SEND_ILLEGAL, ESR_RECEIVE_ILLEGAL, ESR_ILLEGAL_REGISTER = 1 << 5, 1 << 6, 1 << 7
BASE_BSP, BASE_X2APIC, BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11
FIXED, LOWEST, SMI, NMI, INIT, STARTUP, EXTINT = 0, 1, 2, 4, 5, 6, 7
M32: Final = 0xFFFFFFFF
X2_READ: Final = frozenset(
    (
        *(ID, LVR, TPR, PPR, LDR, SVR, ESR, ICR, TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE, *LVT_WRITABLE),
        *(base + 16 * i for base in (ISR, TMR, IRR) for i in range(8)),
    )
)
X2_WRITE: Final = frozenset((TPR, EOI, SVR, ESR, ICR, TIMER_INITIAL, TIMER_DIVIDE, SELF_IPI, *LVT_WRITABLE))


class RegisterFault(Exception):
    """An access that gives #GP (x2APIC)."""


class Ipi(NamedTuple):
    """An interprocessor interrupt on its way."""

    vector: int
    mode: int
    logical: bool
    assert_level: bool
    shorthand: int
    """0 none, 1 self, 2 all, 3 all but self."""
    destination: int
    """xAPIC: 8 bits; x2APIC: 32 bits."""
    x2apic: bool


class LocalApic:
    """One local APIC. `now` gives nanoseconds; `send` delivers an interprocessor interrupt."""

    def __init__(self, number: int, now: Callable[[], int], send: Callable[[LocalApic, Ipi], None]) -> None:
        self.number: Final = number
        self.apic_id: Final = 2 * number
        self._now: Final = now
        self._send: Final = send
        self.base = APIC_BASE | BASE_ENABLE | (BASE_BSP if number == 0 else 0)
        self.irr = 0
        self.isr = 0
        self.tmr = 0
        self.deadline: int | None = None
        """When the timer expires, ns."""
        self.software_enabled: Callable[[LocalApic], None] = lambda apic: None
        """Called when the spurious-interrupt vector register enables it."""
        self.ended: Callable[[int], None] = lambda vector: None
        """Called with the vector when a level-triggered interrupt ends: the message to the I/O APICs."""
        self.reset()

    def virtual_wire(self) -> None:
        """As a BIOS leaves it: on, with the 8259 passed on by LINT0 and NMI by LINT1."""
        self.svr |= ENABLED
        self.lvt[LVT_LINT0] = EXTINT << 8
        self.lvt[LVT_LINT1] = NMI << 8

    def reset(self) -> None:
        """After RESET or INIT; the base register keeps its value (INIT)."""
        self.irr = self.isr = self.tmr = 0
        self.tpr = 0
        self.ldr = 0
        self.dfr = M32
        self.svr = 0xFF
        self._esr = self._esr_latched = 0
        self._icr = 0
        self.lvt = dict.fromkeys(LVT_WRITABLE, MASKED)
        self._initial = 0
        self._divide = 0
        self._started = 0
        self.deadline = None

    # --- base register

    @property
    def hardware_enabled(self) -> bool:
        """Enabled in the base register."""
        return bool(self.base & BASE_ENABLE)

    @property
    def x2apic(self) -> bool:
        """In x2APIC mode."""
        return self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE | BASE_X2APIC

    @property
    def enabled(self) -> bool:
        """Takes interrupts: enabled in the base register and by software."""
        return self.hardware_enabled and bool(self.svr & ENABLED)

    def write_base(self, value: int) -> None:
        """IA32_APIC_BASE. RegisterFault: a reserved bit, a move of the page (not served), or a forbidden change of mode."""
        if (value ^ self.base) & ~(BASE_ENABLE | BASE_X2APIC | BASE_BSP) or value & (
            BASE_ENABLE | BASE_X2APIC
        ) == BASE_X2APIC:
            raise RegisterFault
        if self.x2apic and value & BASE_ENABLE and not value & BASE_X2APIC:
            raise RegisterFault
        if not self.hardware_enabled and value & BASE_X2APIC:
            raise RegisterFault
        if self.hardware_enabled and not value & BASE_ENABLE:
            self.reset()
        self.base = value & ~BASE_BSP | self.base & BASE_BSP
        if self.x2apic:
            self.ldr = (self.apic_id >> 4) << 16 | 1 << (self.apic_id & 15)

    # --- interrupts

    def accept(self, vector: int, *, level: bool = False, always: bool = False) -> bool:
        """A fixed interrupt arrives. True: it was not pending before. `always`: it stays pending even while the APIC is
        disabled by software (Xen's event upcall)."""
        if vector < 16:
            self._error(ESR_RECEIVE_ILLEGAL)
            return False
        if not (self.enabled or always):
            return False
        bit = 1 << vector
        self.tmr = self.tmr | bit if level else self.tmr & ~bit
        new = not self.irr & bit
        self.irr |= bit
        return new

    @property
    def ppr(self) -> int:
        """Processor priority."""
        servicing = self.isr.bit_length() - 1
        return self.tpr if self.tpr >> 4 >= max(servicing, 0) >> 4 else servicing & 0xF0

    def pending(self) -> int | None:
        """The vector that the processor is to take, if any."""
        if not self.irr or not self.enabled:
            return None
        vector = self.irr.bit_length() - 1
        return vector if vector >> 4 > self.ppr >> 4 else None

    def taken(self, vector: int) -> None:
        """The processor took it."""
        bit = 1 << vector
        if self.irr & bit:
            self.irr &= ~bit
            self.isr |= bit

    def end_of_interrupt(self) -> None:
        """The highest one in service is done."""
        if self.isr:
            vector = self.isr.bit_length() - 1
            self.isr &= ~(1 << vector)
            if self.tmr >> vector & 1:
                self.ended(vector)

    def _error(self, bit: int) -> None:
        if self._esr & bit:
            return
        self._esr |= bit
        lvt = self.lvt[LVT_ERROR]
        if lvt & MASKED:
            return
        if lvt & 0xFF >= 16:
            self.accept(lvt & 0xFF)
        else:
            self._esr |= ESR_RECEIVE_ILLEGAL  # without an interrupt of its own: that would have no end

    def is_logical_target(self, ipi: Ipi) -> bool:
        """A logical destination means this one."""
        if self.x2apic:
            return self.ldr >> 16 == ipi.destination >> 16 and bool(self.ldr & ipi.destination & 0xFFFF)
        mine, wanted = self.ldr >> 24, ipi.destination & 0xFF
        if self.dfr >> 28 == 0xF:
            return bool(mine & wanted)
        return mine >> 4 == wanted >> 4 and bool(mine & wanted & 0xF)

    def is_target(self, ipi: Ipi, sender: LocalApic) -> bool:
        """An interprocessor interrupt is for this one."""
        if ipi.shorthand:
            return ipi.shorthand == 2 or (self is sender) == (ipi.shorthand == 1)
        if ipi.destination == (M32 if ipi.x2apic else 0xFF):
            return True
        return self.is_logical_target(ipi) if ipi.logical else self.apic_id == ipi.destination

    # --- timer

    def _step(self) -> int:
        code = self._divide & 3 | self._divide >> 1 & 4
        return BUS_NS * (1 if code == 7 else 2 << code)

    def _start_timer(self, value: int) -> None:
        self._initial = value
        self._started = self._now()
        self.deadline = self._started + value * self._step() if value else None

    def _current_count(self) -> int:
        if self.deadline is None:
            return 0
        left = max(self.deadline - self._now(), 0)
        return min(left // self._step(), self._initial)

    def expire(self, now: int) -> bool:
        """The timer, if it is due. True: an interrupt came of it."""
        if self.deadline is None or now < self.deadline:
            return False
        lvt = self.lvt[LVT_TIMER]
        if lvt & PERIODIC:
            period = self._initial * self._step()
            self.deadline += max((now - self.deadline) // period + 1, 1) * period
        else:
            self.deadline = None
        return not lvt & MASKED and self.accept(lvt & 0xFF)

    # --- registers

    def read(self, offset: int) -> int:
        """The 32-bit register at a multiple of 16."""
        if offset in self.lvt:
            return self.lvt[offset]
        for base, value in ((ISR, self.isr), (TMR, self.tmr), (IRR, self.irr)):
            if base <= offset < base + 0x80:
                return value >> 2 * (offset - base) & M32
        if offset == ID:
            return self.apic_id if self.x2apic else self.apic_id << 24
        simple = {
            LVR: VERSION, TPR: self.tpr, PPR: self.ppr, LDR: self.ldr, DFR: self.dfr, SVR: self.svr, ESR: self._esr_latched,
            ICR: self._icr & M32, ICR2: self._icr >> 32, TIMER_INITIAL: self._initial, TIMER_DIVIDE: self._divide,
        }  # fmt: skip
        if offset == TIMER_CURRENT:
            return self._current_count()
        if offset not in simple and offset not in (APR, EOI):
            self._error(ESR_ILLEGAL_REGISTER)
        return simple.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        """Write the 32-bit register at a multiple of 16 (x2APIC: ICR has 64 bits)."""
        if offset == EOI:
            self.end_of_interrupt()
        elif offset == TPR:
            self.tpr = value & 0xFF
        elif offset == ICR:
            self._write_icr(value)
        elif offset == ICR2:
            self._icr = self._icr & M32 | (value & 0xFF000000) << 32
        elif offset == SVR:
            before, self.svr = self.svr, value & 0x1FF
            if not value & ENABLED:
                for register in self.lvt:
                    self.lvt[register] |= MASKED
            elif not before & ENABLED:
                self.software_enabled(self)
        elif offset in self.lvt:
            self.lvt[offset] = value & LVT_WRITABLE[offset] | (0 if self.svr & ENABLED else MASKED)
        elif offset == TIMER_INITIAL:
            self._start_timer(value & M32)
        elif offset == TIMER_DIVIDE:
            left = self._current_count()
            self._divide = value & 0xB
            if self.deadline is not None:
                self.deadline = self._now() + left * self._step()
        elif offset == ESR:
            self._esr_latched, self._esr = self._esr, 0
        elif offset == LDR:
            self.ldr = value & 0xFF000000
        elif offset == DFR:
            self.dfr = value | 0x0FFFFFFF
        elif offset not in (ID, LVR, APR, PPR, TIMER_CURRENT):
            self._error(ESR_ILLEGAL_REGISTER)

    def _write_icr(self, value: int) -> None:
        if self.x2apic:
            self._icr = value & 0xFFFFFFFF_000CCFFF
            destination = value >> 32
        else:
            self._icr = self._icr & ~M32 | value & 0x000CCFFF
            destination = self._icr >> 56
        ipi = Ipi(
            value & 0xFF,
            value >> 8 & 7,
            bool(value >> 11 & 1),
            bool(value >> 14 & 1),
            value >> 18 & 3,
            destination,
            self.x2apic,
        )
        if ipi.mode in (FIXED, LOWEST) and ipi.vector < 16:
            self._error(ESR_SEND_ILLEGAL)
            return
        self._send(self, ipi)

    # --- x2APIC

    def read_msr(self, index: int) -> int:
        """MSR 0x800 to 0x8ff. RegisterFault."""
        offset = index - 0x800 << 4
        if not self.x2apic or offset not in X2_READ:
            raise RegisterFault
        return self._icr if offset == ICR else self.read(offset)

    def write_msr(self, index: int, value: int) -> None:
        """MSR 0x800 to 0x8ff. RegisterFault: not in x2APIC mode, read-only, or a reserved bit."""
        offset = index - 0x800 << 4
        if not self.x2apic or offset not in X2_WRITE:
            raise RegisterFault
        if (
            (offset != ICR and value >> 32)
            or (offset in (EOI, ESR) and value)
            or (offset == TPR and value >> 8)
        ):
            raise RegisterFault
        if offset == SELF_IPI:
            if value >> 8:
                raise RegisterFault
            self._send(self, Ipi(value, FIXED, False, True, 1, self.apic_id, True))
        else:
            self.write(offset, value)
