"""What the rest of a domain process sees of a vCPU: run until exit, registers, injection, the memory map.

Nothing outside `domains/vcpu/` knows Unicorn. Both kinds of guest (`domains/pv`, `domains/hvm`) are written
against this interface; `domains.vcpu.unicorn_vcpu.UnicornVcpu` implements it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

from bus.addresses import MachineAddr


class VcpuError(Exception):
    """The vCPU itself cannot go on, or was used against its contract: never the guest's doing alone."""


class GuestFault(Exception):
    """Raised by `Vcpu.raise_fault` inside an instruction hook: give the guest this exception instead."""

    def __init__(self, vector: int, error_code: int) -> None:
        super().__init__(f"exception {vector} (error code {error_code:#x}) instead of the instruction")
        self.vector = vector
        self.error_code = error_code


class StopReason(Enum):
    """Why `Vcpu.run` came back."""

    BELL = auto()
    """The bell word was non-zero at the start of a block: somebody wants the thread (event, order, lease)."""
    SLICE = auto()
    """The countdown of blocks given to `run` reached zero."""
    REQUESTED = auto()
    """A hook called `request_stop`."""
    HALT = auto()
    """HLT was executed (HVM) and RIP points behind it."""
    TRIPLE_FAULT = auto()
    """A fault during the delivery of a double fault."""
    BAD_ACCESS = auto()
    """A guest access reached a physical address with nothing mapped there; `Vcpu.bad_access` has it."""


class BadAccess(NamedTuple):
    """A physical access that reached nothing."""

    address: int
    size: int
    write: bool


class Trap(NamedTuple):
    """An exception, or INT n, of a CPL3 guest as the hardware reported it to the hypervisor."""

    vector: int
    error_code: int
    """As the hardware pushes it; 0 for vectors that push none."""
    is_software: bool
    """True for INT n, INT3 and INTO: RIP then points behind the instruction."""


class PvTraps(Protocol):
    """The hypervisor side of a PV vCPU. Called inside the run loop, on the vCPU's thread, with registers in
    `Vcpu.regs` current and writable; what is written there is what the guest continues with."""

    def on_syscall(self) -> None:
        """SYSCALL executed. RIP points behind the instruction. Nothing else was changed."""

    def on_trap(self, trap: Trap) -> None:
        """An exception or software interrupt. RIP as in `Trap.is_software`; CR2 in `regs.cr2`."""

    def on_invalid_opcode(self) -> None:
        """An instruction that the vCPU does not know (#UD), RIP at it: UD2, forced emulation, VMCALL."""

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """CPUID executed unprivileged; the values of EAX, EBX, ECX, EDX."""

    def on_port_in(self, port: int, size: int) -> int:
        """IN at CPL3. May call `Vcpu.raise_fault` to give #GP instead (RIP is then at the instruction)."""

    def on_port_out(self, port: int, size: int, value: int) -> None:
        """OUT at CPL3; as `on_port_in`."""

    def on_rdtsc(self) -> int:
        """RDTSC/RDTSCP while `Vcpu.trap_tsc(True)` is on (else machine code answers with `Vcpu.guest_tsc`):
        the value of the guest's time stamp counter."""


@runtime_checkable
class PvSysenter(Protocol):
    """What a `PvTraps` may have besides: without it SYSENTER gives #GP, as without a registered sysenter
    callback."""

    def on_sysenter(self) -> None:
        """SYSENTER executed. RIP points behind the instruction. Nothing else was changed."""


@runtime_checkable
class PvMmio(Protocol):
    """What a `PvTraps` may have besides: accesses to regions mapped with `map_mmio`, by machine address. Without it they read as all
    ones, and writes are lost."""

    def on_mmio_read(self, address: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes."""

    def on_mmio_write(self, address: int, size: int, value: int) -> None:
        """A store."""


class Registers(Protocol):
    """A view on the live CPU state: each access costs well under a microsecond. All values unsigned.

    Valid on the vCPU's thread only, between runs and inside hooks.
    """

    rax: int
    rcx: int
    rdx: int
    rbx: int
    rsp: int
    rbp: int
    rsi: int
    rdi: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int
    """The architectural value, condition codes and direction flag included."""
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int
    fs_base: int
    gs_base: int
    kernel_gs_base: int
    cs: int
    ss: int
    ds: int
    es: int
    fs: int
    gs: int
    """Selectors only: assigning one sets the selector field. Use `Vcpu.load_segment` for descriptor loads."""

    gdtr_base: int
    gdtr_limit: int
    ldtr_base: int
    ldtr_limit: int
    """Where the guest's own segment loads look descriptors up (linear address, bytes - 1)."""

    def gpr(self, index: int) -> int:
        """General register by its number in machine code (0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP ... 15 R15)."""

    def set_gpr(self, index: int, value: int) -> None:
        """Write a general register by its number."""


class Vcpu(Protocol):
    """One virtual CPU. All methods are called on the thread that runs it, except `ring`."""

    bad_access: BadAccess | None

    @property
    def regs(self) -> Registers:
        """The live registers; always the same object."""

    def run(self, blocks: int) -> StopReason:
        """Run guest code for at most `blocks` translated blocks. The stop is exact: between instructions."""

    def request_stop(self) -> None:
        """From a hook: return from `run` before the next block. No instruction is run twice."""

    def raise_fault(self, vector: int, error_code: int = 0) -> NoReturn:
        """From a SYSCALL, SYSENTER, IN, OUT or CPUID hook: the guest takes this exception instead of the
        instruction. Raises `GuestFault`, which must be let through; `on_trap` is called next, with RIP at
        the instruction."""

    def ring(self) -> None:
        """From any thread: make `run` return soon. Not lost if `run` has not begun; cleared by
        `clear_bell`."""

    def clear_bell(self) -> None:
        """Forget earlier rings. Called before looking at what the ring was for."""

    def map(self, address: MachineAddr, host_address: int, size: int, *, writable: bool = True) -> None:
        """Put host memory at a physical address. Sizes and addresses are whole pages; replaces what was
        there."""

    def map_mmio(self, address: MachineAddr, size: int) -> None:
        """Make whole pages a device region."""

    def unmap(self, address: MachineAddr, size: int) -> None:
        """Take physical memory away."""

    def protect(self, address: MachineAddr, size: int, *, writable: bool) -> None:
        """Change the write permission of mapped physical memory. Only while stopped."""

    def flush_tlb(self) -> None:
        """Forget all cached translations of guest-virtual addresses (2 to 20 us with refill)."""

    def drop_code(self, address: MachineAddr, size: int) -> None:
        """Forget translated code of these physical bytes: they changed behind the vCPU's back."""

    def flush_page(self, address: int) -> None:
        """Forget the cached translation of one guest-virtual page (0.3 us)."""

    def load_segment(self, name: str, selector: int, base: int, limit: int, attributes: int) -> None:
        """Load a segment register (es cs ss ds fs gs ldtr tr) with its hidden part. `limit` in bytes;
        `attributes` as descriptor bits 40..55 (type 0..3, S 4, DPL 5..6, P 7, AVL 12, L 13, D/B 14, G 15).
        The privilege level follows SS."""

    def save_context(self) -> bytes:
        """The vCPU's whole state, between runs. One `Vcpu` object serves all vCPUs of a domain in turn."""

    def load_context(self, context: bytes) -> None:
        """Become another vCPU: what `save_context` of this object gave. Flushes the TLB."""

    def set_tsc(self, *, offset: int, multiplier: int = 1 << 32) -> None:
        """The guest's TSC is (host TSC x multiplier >> 32) + offset from now on."""

    def trap_tsc(self, enabled: bool) -> None:
        """Send RDTSC and RDTSCP to the hook instead."""

    def guest_tsc(self) -> int:
        """What RDTSC gives in the guest now (0.1 us)."""

    def host_tsc(self) -> int:
        """The host's time stamp counter (0.1 us)."""

    def native_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of what the vCPU can execute; a guest's CPUID policy starts from it (2 us)."""

    def save_extended(self) -> bytes:
        """x87/SSE state as FXSAVE lays it out (512 bytes)."""

    def load_extended(self, state: bytes) -> None:
        """Restore `save_extended`'s state, or a guest's FXSAVE image."""


class PvVcpu(Vcpu, Protocol):
    """One of a PV guest, whose debug registers Xen virtualises."""

    @property
    def breakpoints_armed(self) -> bool:
        """`set_breakpoints` enabled any."""

    def set_breakpoints(self, addresses: Sequence[int], control: int) -> None:
        """Arm the breakpoints of DR0 to DR3 that DR7 enables. Between runs, and none may be
        armed while contexts change."""

    def debug_status(self) -> int:
        """In `on_trap` of a #DB: DR6's bits B0 to B3 and BS of this one, which are forgotten then."""
