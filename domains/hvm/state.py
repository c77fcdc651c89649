"""Per-vCPU state of an HVM domain that the vCPU object does not hold."""

from __future__ import annotations

from typing import Final

from bus.abi.hvm.save import hvm_hw_cpu
from domains.hvm.lapic import LocalApic
from domains.pv.state import VcpuState


class HvmState(VcpuState):
    """`VcpuState` as the shared handlers want it, with a local APIC and MTRRs."""

    __slots__ = ("apic", "armed", "first", "mtrr", "nmi", "sipi", "upcall_vector")

    def __init__(self, vcpu_id: int, apic: LocalApic) -> None:
        super().__init__(vcpu_id)
        self.apic: Final = apic
        self.upcall_vector = 0
        """HVMOP_set_evtchn_upcall_vector; 0: none."""
        self.armed: tuple[int, int] | None = None
        """The interrupt that the vCPU was asked to take: (where from, see `domains.hvm.interrupts`; vector)."""
        self.sipi: int | None = None
        """Start at this vector when it next runs: a start-up IPI came."""
        self.first: hvm_hw_cpu | None = None
        """Start with these registers when it next runs: VCPUOP_initialise."""
        self.nmi = False
        self.mtrr: dict[int, int] = {}
        self.periodic_period = 0

    def deadline(self) -> int | None:
        """The next timer of any kind: VIRQ_TIMER, SCHEDOP_poll, local APIC."""
        paravirtual, apic = super().deadline(), self.apic.deadline
        if paravirtual is None or (apic is not None and apic < paravirtual):
            return apic
        return paravirtual
