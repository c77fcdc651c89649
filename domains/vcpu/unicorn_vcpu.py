"""The vCPU of a PV guest: kernel and user code at CPL3 in long mode, every trap to the hypervisor side in
Python.

See `domains.vcpu.api` for the contract and `docs/vcpu.md` for what had to be worked round.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Final

from unicorn import UC_HOOK_INSN_INVALID, UC_HOOK_INTR, x86_const

from domains.vcpu import thunks
from domains.vcpu.api import GuestFault, PvMmio, PvSysenter, PvTraps, Trap
from domains.vcpu.machine import LAST_CANONICAL_PAGE, Machine
from domains.vcpu.state import CR2, RAX, RBX, RCX, RDX, RIP
from domains.vcpu.walk import GuestMemory, NotMapped

PV_CR0: Final = 0x80050033
"""PG, AM, WP, NE, ET, MP, PE."""
PV_CR4: Final = 0x620
"""OSXMMEXCPT, OSFXSR, PAE. A guest's own bits are set by who virtualises CR4."""
PV_EFER: Final = 0xD01
"""NXE, LMA, LME, SCE."""
CODE64_DPL3: Final = 0xA0FB
DATA_DPL3: Final = 0xC0F3
FLAT_LIMIT: Final = 0xFFFFFFFF
XEN_TSS_SELECTOR: Final = 0xE040
TSS_LIMIT: Final = 0x67
BUSY_TSS64: Final = 0x8B
XEN_IDT: Final = 0xFFFF82D040440000
"""Where SIDT says that the IDT is: in the range of Xen's own image."""
IDT_LIMIT: Final = 0xFFF
ENTRIES: Final = (b"\x0f\x05", b"\x0f\x34")
"""SYSCALL and SYSENTER."""
DB, GP, PF = 1, 13, 14
FETCH: Final = 1 << 4
"""In the error code of #PF."""
_UD: Final = 6

M32: Final = 0xFFFFFFFF
M64: Final = (1 << 64) - 1
_MAX_TRAPS: Final = 4096

_pointer, _u32, _i32 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
_Interrupt = ctypes.CFUNCTYPE(None, _pointer, _u32, _pointer)
_Invalid = ctypes.CFUNCTYPE(ctypes.c_bool, _pointer, _pointer)
_Plain = ctypes.CFUNCTYPE(None, _pointer, _pointer)
_Answer = ctypes.CFUNCTYPE(_i32, _pointer, _pointer)
_In = ctypes.CFUNCTYPE(_u32, _pointer, _u32, _i32, _pointer)
_Out = ctypes.CFUNCTYPE(None, _pointer, _u32, _i32, _u32, _pointer)


class UnicornVcpu(Machine):
    """`domains.vcpu.api.Vcpu` for PV guests.

    At first: 64-bit code at CPL3, flat segments with null selectors but CS and SS, general registers zero,
    RFLAGS 0x202, CR3 0, no memory. The guest's TSC is the host's.
    """

    def __init__(self, traps: PvTraps) -> None:
        self._traps: Final = traps
        self._known_traps: Final[dict[tuple[int, int, int], Trap]] = {}
        super().__init__()
        self._guest_memory: Final = GuestMemory(self._memory, self.regs, self._cpu)
        machine = self._machine
        machine.reg_write(x86_const.UC_X86_REG_MSR, (0xC0000080, PV_EFER))
        machine.reg_write(x86_const.UC_X86_REG_CR4, PV_CR4)
        machine.reg_write(x86_const.UC_X86_REG_CR0, PV_CR0)
        for name in ("ds", "es", "fs", "gs"):
            self.load_segment(name, 0, 0, FLAT_LIMIT, DATA_DPL3)
        self.load_segment("ss", 0xE02B, 0, FLAT_LIMIT, DATA_DPL3)
        self.load_segment("cs", 0xE033, 0, FLAT_LIMIT, CODE64_DPL3)
        # What STR, SIDT and SGDT show is Xen's: nothing in here goes by the task register or the IDT.
        self.load_segment("tr", XEN_TSS_SELECTOR, 0, TSS_LIMIT, BUSY_TSS64)
        regs = self.regs
        for number in range(16):
            regs.q[number] = 0
        regs.rflags = 0x202
        regs.rip = 0
        regs.idtr_base, regs.idtr_limit = XEN_IDT, IDT_LIMIT

    @property
    def breakpoints_armed(self) -> bool:
        """See `Vcpu`."""
        return self._breakpoints.armed

    def debug_status(self) -> int:
        """See `Vcpu`."""
        self._watchpoints.forget()
        return self._breakpoints.status()

    def put_off(self) -> bool:
        """As `Machine.put_off`. SYSCALL and SYSENTER, and an instruction that faults (`_hook_interrupt`), enter Xen: the #DB that waits
        comes there, and no guest sees it."""
        try:
            entry = self._guest_memory.read(self.regs.rip, 2) in ENTRIES
        except NotMapped:
            return True
        if entry:
            self._watchpoints.forget()
            return True
        return super().put_off()

    def set_breakpoints(self, addresses: Sequence[int], control: int) -> None:
        """See `Vcpu`."""
        self._between_runs("set_breakpoints")
        self._breakpoints.set(addresses, control)

    def _install(self) -> None:
        env, control, found, page = self._env, self._control.address, self._found, self._code
        interrupt = self._callback(_Interrupt, self._hook_interrupt())
        invalid = self._callback(_Invalid, self._on_invalid)
        self._add_hook(UC_HOOK_INTR, page.add(thunks.forget_exception(env, found, interrupt)))
        self._add_hook(UC_HOOK_INSN_INVALID, page.add(thunks.forget_exception(env, found, invalid)))
        syscall = self._callback(_Plain, self._hook_syscall())
        sysenter = self._callback(_Plain, self._on_sysenter)
        for instruction, target in (
            (x86_const.UC_X86_INS_SYSCALL, syscall),
            (x86_const.UC_X86_INS_SYSENTER, sysenter),
        ):
            self._add_instruction_hook(instruction, page.add(thunks.syscall_hook(env, control, target)))
        for instruction, target in (
            (x86_const.UC_X86_INS_IN, self._callback(_In, self._on_in)),
            (x86_const.UC_X86_INS_OUT, self._callback(_Out, self._on_out)),
            (x86_const.UC_X86_INS_CPUID, self._callback(_Answer, self._on_cpuid)),
        ):
            self._add_instruction_hook(instruction, page.add(thunks.instruction_hook(env, control, target)))
        for instruction, with_aux in (
            (x86_const.UC_X86_INS_RDTSC, False),
            (x86_const.UC_X86_INS_RDTSCP, True),
        ):
            target = self._callback(_Answer, self._on_rdtscp if with_aux else self._on_rdtsc)
            fast = page.add(thunks.tsc_hook(env, found, target, with_aux=with_aux))
            self._add_instruction_hook(instruction, fast, control)

    # The two hot hooks are closures: no attribute is looked up on the way.

    def _mmio_read(self, address: int, size: int) -> int:
        traps = self._traps
        return traps.on_mmio_read(address, size) if isinstance(traps, PvMmio) else M64

    def _mmio_write(self, address: int, size: int, value: int) -> None:
        traps = self._traps
        if isinstance(traps, PvMmio):
            traps.on_mmio_write(address, size, value)

    def _hook_syscall(self) -> Callable[..., None]:
        on_syscall, fault, undo = self._traps.on_syscall, self._fault, self._undo

        def hook(uc: int, user: int) -> None:
            try:
                on_syscall()
            except GuestFault as wanted:
                fault(wanted)
            except BaseException as error:  # nothing may be lost in a C callback: run() raises it again
                undo(error)

        return hook

    def _hook_interrupt(self) -> Callable[..., None]:
        on_trap, failed, known, words = self._traps.on_trap, self._failed, self._known_traps, self.regs.d
        hit, forget = self._watch_hit, self._watchpoints.forget
        at_error, at_software = self._found.error_code // 4, self._found.exception_is_int // 4
        q, retried = self.regs.q, self._edge_retried

        def hook(uc: int, vector: int, user: int) -> None:
            try:
                key = (vector, words[at_error], words[at_software])
                if vector == PF:
                    if (
                        key[1] & FETCH
                        and not q[CR2] & 0xFFF
                        and q[CR2] - 1 >> 12 == q[RIP] >> 12
                        and retried()
                    ):
                        return
                elif vector == GP and q[RIP] >> 12 == LAST_CANONICAL_PAGE and not key[2] and retried():
                    return
                trap = known.get(key)
                if trap is None:
                    trap = Trap(vector, key[1], bool(key[2]))
                    if len(known) < _MAX_TRAPS:
                        known[key] = trap
                if hit.value and vector != DB:
                    forget()
                on_trap(trap)
            except BaseException as error:
                failed(error)

        return hook

    def _on_invalid(self, uc: int, user: int) -> bool:
        try:
            if self._watch_hit.value:
                self._watchpoints.forget()
            if self.regs.d[self._found.exception_is_int // 4]:
                # Not #UD but INT 6, which Unicorn brings here too.
                self.regs.rip = self.regs.q[self._found.exception_next_eip // 8]
                self._traps.on_trap(Trap(_UD, 0, True))
            else:
                self._traps.on_invalid_opcode()
        except BaseException as error:
            self._failed(error)
        return True

    def _on_sysenter(self, uc: int, user: int) -> None:
        try:
            traps = self._traps
            if isinstance(traps, PvSysenter):
                traps.on_sysenter()
            else:
                self._fault(GuestFault(GP, 0))
        except GuestFault as wanted:
            self._fault(wanted)
        except BaseException as error:
            self._undo(error)

    def _on_in(self, uc: int, port: int, size: int, user: int) -> int:
        try:
            return self._traps.on_port_in(port, size) & M32
        except GuestFault as wanted:
            self._fault(wanted)
        except BaseException as error:
            self._undo(error)
        return M32

    def _on_out(self, uc: int, port: int, size: int, value: int, user: int) -> None:
        try:
            self._traps.on_port_out(port, size, value & ((1 << 8 * size) - 1))
        except GuestFault as wanted:
            self._fault(wanted)
        except BaseException as error:
            self._undo(error)

    def _on_cpuid(self, uc: int, user: int) -> int:
        try:
            q = self.regs.q
            eax, ebx, ecx, edx = self._traps.on_cpuid(q[RAX] & M32, q[RCX] & M32)
            q[RAX], q[RBX], q[RCX], q[RDX] = eax & M32, ebx & M32, ecx & M32, edx & M32
        except GuestFault as wanted:
            self._fault(wanted)
        except BaseException as error:
            self._undo(error)
        return 1

    def _on_rdtsc(self, uc: int, user: int) -> int:
        try:
            value = self._traps.on_rdtsc()
            q = self.regs.q
            q[RAX], q[RDX] = value & M32, value >> 32 & M32
        except BaseException as error:
            self._failed(error)
        return 1

    def _on_rdtscp(self, uc: int, user: int) -> int:
        self.regs.rcx = self.regs.tsc_aux & M32
        return self._on_rdtsc(uc, user)
