"""Which interrupt the running vCPU is to take, and when it took it; interprocessor interrupts between the vCPUs of a domain.

The upcall by HVM_PARAM_CALLBACK_IRQ's vector has no acknowledgement: it is asked for as long as the vCPU's upcall flag is up,
as Xen does at each entry. Everything else goes through the local APIC. A request stands until the guest opens its interrupts;
it is withdrawn when its cause has gone (seen at the next exit: an upcall for which the guest found the events before it
opened its interrupts can still come, with nothing pending).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from domains.hvm.lapic import EXTINT, FIXED, INIT, LOWEST, LVT_LINT0, MASKED, NMI, STARTUP, Ipi, LocalApic
from domains.hvm.state import HvmState
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu


class InterruptController(Protocol):
    """The 8259 pair, as the processor sees it."""

    def pending_vector(self) -> int | None:
        """The vector that an acknowledgement would give now; None while the INT line is low."""

    def acknowledge(self) -> int:
        """The INTA cycle: the vector, which is in service from now on (or a spurious one)."""


CALLBACK, APIC, PIC = range(3)
"""Where the interrupt that the vCPU was asked to take comes from."""


class Interrupts:
    """See the module. `started`: a start-up interrupt woke a vCPU; `stopped`: an INIT put it to wait."""

    def __init__(self, octets: memoryview) -> None:
        self._octets: Final = octets
        self.states: Sequence[HvmState] = ()
        self.vcpu: UnicornHvmVcpu | None = None
        self.started: Callable[[HvmState], None] = lambda state: None
        self.stopped: Callable[[HvmState], None] = lambda state: None
        self.callback_vector = 0
        """HVM_PARAM_CALLBACK_IRQ by vector; 0: none."""
        self._callback_line: Callable[[bool], None] | None = None
        self._callback_up = False
        self.pic: InterruptController | None = None
        """The 8259 pair of a guest that has one."""
        self.changed = False
        """A line or a message changed what the vCPU that runs is to take, since `arm` last looked."""

    # --- the processor's side

    def _wanted(self, state: HvmState) -> tuple[int, int] | None:
        """In Xen's order: the upcall, the 8259, the local APIC."""
        if self._callback_line is not None:
            self.follow_upcall()
        elif self.callback_vector and state.info >= 0 and self._octets[state.info]:
            return CALLBACK, self.callback_vector
        if self.pic is not None and self.accepts_pic(state):
            vector = self.pic.pending_vector()
            if vector is not None:
                return PIC, vector
        vector = state.apic.pending()
        return None if vector is None else (APIC, vector)

    @staticmethod
    def accepts_pic(state: HvmState) -> bool:
        """The 8259's INT line reaches this vCPU: the local APIC is off, or passes it on (virtual wire mode)."""
        if state.id:
            return False
        apic = state.apic
        return not apic.hardware_enabled or apic.lvt[LVT_LINT0] & (MASKED | 0x700) == EXTINT << 8

    def set_callback_line(self, line: Callable[[bool], None] | None) -> None:
        """HVM_PARAM_CALLBACK_IRQ by a line, which goes up with the upcall flag of vCPU 0, unless that has an upcall vector, and down
        with the flag; the old one goes low."""
        if self._callback_line is not None and self._callback_up:
            self._callback_line(False)
        self._callback_line, self._callback_up = line, False
        self.follow_upcall()

    def follow_upcall(self) -> None:
        """The guest may have cleared its upcall flag: before a controller looks at the line again, it has the level of now."""
        if self._callback_line is not None:
            state = self.states[0]
            # As Xen's hvm_assert_evtchn_irq: an upcall vector of the vCPU's own goes before the line. Linux sets both, the line to
            # GSI 1 only so that tools see a guest with PV drivers: raised, it would be the keyboard's interrupt with each event.
            flag = state.info >= 0 and bool(self._octets[state.info])
            level = flag and (self._callback_up or not state.upcall_vector)
            if level != self._callback_up:
                self._callback_up = level
                self._callback_line(level)

    def has_work(self, state: HvmState) -> bool:
        """Something would interrupt the vCPU (or does as soon as it lets it)."""
        return state.nmi or self._wanted(state) is not None

    def settle(self, state: HvmState) -> None:
        """If what was asked for was taken, the local APIC moves it into service."""
        armed = state.armed
        if armed is None:
            return
        assert self.vcpu is not None
        if not self.vcpu.interrupt_pending():
            state.armed = None
            if armed[0] == APIC:
                state.apic.taken(armed[1])
            elif armed[0] == PIC:
                assert self.pic is not None
                self.pic.acknowledge()

    def arm(self, state: HvmState) -> None:
        """Ask for what is due now; `state` is the running vCPU, settled."""
        vcpu = self.vcpu
        assert vcpu is not None
        self.changed = False
        if state.nmi:
            state.nmi = False
            vcpu.inject_nmi()
        wanted = self._wanted(state)
        if wanted == state.armed:
            return
        if wanted is not None:
            vcpu.inject_interrupt(wanted[1])
        else:
            vcpu.cancel_interrupt()
        state.armed = wanted

    def disarm(self, state: HvmState) -> None:
        """Before another vCPU takes the processor."""
        self.settle(state)
        if state.armed is not None:
            assert self.vcpu is not None
            self.vcpu.cancel_interrupt()
            state.armed = None

    # --- interrupts that arrive

    def upcall(self, state: HvmState) -> None:
        """The vCPU's upcall flag went up."""
        self.follow_upcall()
        if state.upcall_vector:
            state.apic.accept(state.upcall_vector, always=True)
        state.wake()

    def apic_enabled(self, apic: LocalApic) -> None:
        """The guest enabled a local APIC: an upcall that is due was perhaps lost with the state before (INIT)."""
        state = self.states[apic.number]
        if state.info >= 0 and self._octets[state.info]:
            self.upcall(state)

    def timer(self, state: HvmState, now: int) -> None:
        """The local APIC's timer, if it is due."""
        if state.apic.expire(now):
            state.wake()

    def message(self, vector: int, mode: int, destination: int, *, logical: bool, level: bool) -> bool:
        """An interrupt message of the I/O APIC or of a device (MSI). False: nobody takes it."""
        ipi = Ipi(vector, mode, logical, True, 0, destination, False)
        return self._deliver(ipi, self.states[0].apic, level=level)

    def send(self, sender: LocalApic, ipi: Ipi) -> None:
        """Deliver an interprocessor interrupt."""
        self._deliver(ipi, sender, level=False)

    def _deliver(self, ipi: Ipi, sender: LocalApic, *, level: bool) -> bool:
        self.changed = True
        targets = [s for s in self.states if s.apic.hardware_enabled and s.apic.is_target(ipi, sender)]
        if ipi.mode == LOWEST and targets:
            targets = [min(targets, key=lambda s: s.apic.ppr)]
        for state in targets:
            if ipi.mode in (FIXED, LOWEST):
                state.apic.accept(ipi.vector, level=level)
                state.wake()
            elif ipi.mode == NMI:
                state.nmi = True
                state.wake()
            elif ipi.mode == EXTINT and self.pic is not None:
                state.wake()  # the 8259 pair's vector is taken where it is accepted (virtual wire)
            elif ipi.mode == INIT and ipi.assert_level:
                state.apic.reset()
                state.sipi = None
                self.stopped(state)
            elif ipi.mode == STARTUP and not state.online:
                state.sipi = ipi.vector
                self.started(state)
        return bool(targets)
