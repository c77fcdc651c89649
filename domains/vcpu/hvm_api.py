"""What the rest of a domain process sees of an HVM or PVH vCPU, besides what every vCPU has."""

from __future__ import annotations

from typing import Protocol


class HvmExits(Protocol):
    """The hypervisor side of an HVM vCPU. Called inside the run loop, on the vCPU's thread, with `regs`
    current and writable and RIP at the instruction.

    Each may call `UnicornHvmVcpu.raise_fault` to give the guest an exception instead (not the MMIO hooks:
    their instruction has begun). Exceptions, INT n and external interrupts go through the guest's IDT
    without them.
    """

    def on_port_in(self, port: int, size: int) -> int:
        """IN or one step of INS; permission was checked. The value."""

    def on_port_out(self, port: int, size: int, value: int) -> None:
        """OUT or one step of OUTS."""

    def on_mmio_read(self, address: int, size: int) -> int:
        """A read of a region mapped with `map_mmio`; guest-physical address."""

    def on_mmio_write(self, address: int, size: int, value: int) -> None:
        """A write of such a region."""

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""

    def on_rdmsr(self, index: int) -> int:
        """RDMSR of a register that the vCPU does not keep itself (`hvm_msrs.NATIVE_MSRS`), at CPL0."""

    def on_wrmsr(self, index: int, value: int) -> None:
        """WRMSR of such a register, at CPL0."""

    def on_hypercall(self) -> None:
        """VMCALL or VMMCALL, at any CPL. RIP is moved behind it unless the hook changes RIP."""

    def on_rdtsc(self) -> int:
        """RDTSC or RDTSCP while `trap_tsc(True)` is on."""

    def on_cr_write(self, register: int, value: int) -> int:
        """A write of CR0, CR3 or CR4 by MOV, LMSW or CLTS, for registers chosen with `trap_control_writes`.
        The value that is really loaded."""

    def on_cr8_read(self) -> int:
        """MOV from CR8: the task priority, 0 to 15."""

    def on_cr8_write(self, priority: int) -> None:
        """MOV to CR8, of 0 to 15."""

    def on_invlpg(self, address: int) -> None:
        """INVLPG while `trap_invlpg(True)` is on; the address is linear. The vCPU's own translation is
        dropped after."""
