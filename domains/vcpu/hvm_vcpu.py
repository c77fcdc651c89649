"""The vCPU of an HVM or PVH guest: all modes from reset on, the guest's own page tables, IDT and MSRs.

What must leave the guest does so by Unicorn's instruction hooks (ports, CPUID, MMIO) and by the SVM
intercepts that QEMU's code still has: with the "guest" bit of hflags set they arrive as pseudo-exceptions
0x100 + exit code. The VMCB that this code reads is a page beyond the guest's physical address space.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Final

from unicorn import UC_HOOK_INSN_INVALID, UC_HOOK_INTR, x86_const

from bus.addresses import MachineAddr
from domains.vcpu import hvm_msrs, hvm_thunks, limits, strings, thunks
from domains.vcpu.api import GuestFault, StopReason, VcpuError
from domains.vcpu.context_reader import debug_registers
from domains.vcpu.corrections import Corrections, general_registers
from domains.vcpu.hvm_api import HvmExits
from domains.vcpu.insides import library
from domains.vcpu.machine import LAST_CANONICAL_PAGE, Machine
from domains.vcpu.operand import memory_operand
from domains.vcpu.state import HF_CPL, HF_OSFXSR, RAX, RBX, RCX, RDX
from domains.vcpu.thunks import Control
from domains.vcpu.walk import GuestMemory, NotMapped

VMCB: Final = 1 << 40
"""Guest-physical address of the hidden VMCB, then two pages of MSR permission map: beyond what 40-bit
tables reach."""
VMCB_SIZE: Final = 0x3000
MSRPM: Final = 0x1000
VMCB_MSRPM: Final = 0x48
"""In the VMCB: physical address of the MSR permission map (AMD64 APM volume 2, appendix B)."""
VIRQ, NMI, INHIBITED = 0x100, 0x200, 1 << 3
"""interrupt_request bits; the STI and MOV SS shadow in hflags."""
HF_GUEST: Final = 1 << 21
HF2_NMI: Final = 1 << 2
EXIT_CR_READ: Final = 0
EXIT_CR_WRITE, EXIT_INVLPG, EXIT_MSR, EXIT_SHUTDOWN = 0x10, 0x79, 0x7C, 0x7F
INTERCEPT_INVLPG, INTERCEPT_MSR, INTERCEPT_SHUTDOWN = 1 << 25, 1 << 28, 1 << 31
DB, UD, GP, PF = 1, 6, 13, 14
IF: Final = 1 << 9
PE, VM, LMA = 1, 1 << 17, 1 << 10
M32, M64 = (1 << 32) - 1, (1 << 64) - 1
CODE32_FLAT, DATA32_FLAT, TSS32_BUSY = 0xC09B, 0xC093, 0x008B

_pointer, _u32, _i32, _u64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint64
_Interrupt = ctypes.CFUNCTYPE(None, _pointer, _u32, _pointer)
_Correct = ctypes.CFUNCTYPE(_u32, _pointer, _u32, _pointer)
_Invalid = ctypes.CFUNCTYPE(ctypes.c_bool, _pointer, _pointer)
_Plain = ctypes.CFUNCTYPE(None, _pointer, _pointer)
_Answer = ctypes.CFUNCTYPE(_i32, _pointer, _pointer)
_In = ctypes.CFUNCTYPE(_u32, _pointer, _u32, _i32, _pointer)
_Out = ctypes.CFUNCTYPE(None, _pointer, _u32, _i32, _u32, _pointer)


class UnicornHvmVcpu(Machine):
    """One HVM vCPU (or several in turn, by contexts). At first in the state after RESET (real mode, CS:IP
    F000:FFF0)."""

    def __init__(self, exits: HvmExits) -> None:
        self._exits: Final = exits
        self._triple = False
        self._pending_exception: tuple[int, int] | None = None
        super().__init__()
        lib = library()
        self._init_cpu = lib.held("do_cpu_init_x86_64", None, _pointer)
        self._a20 = lib.held("x86_cpu_set_a20_x86_64", None, _pointer, _i32)
        self._exit_loop = lib.held("cpu_exit", None, _pointer)
        self._update = {
            number: lib.held(
                f"cpu_x86_update_cr{number}_x86_64", None, _pointer, _u64 if number == 3 else _u32
            )
            for number in (0, 3, 4)
        }
        base = self._found.vmcb + 16  # after vmcb and tsc_offset
        self._intercept = _u64.from_address(self._env + base)
        self._intercept_cr_read = ctypes.c_uint16.from_address(self._env + base + 8)
        self._intercept_cr_write = ctypes.c_uint16.from_address(self._env + base + 10)
        self._hidden: Final = mmap.mmap(-1, VMCB_SIZE)
        self._hidden_words: Final = memoryview(self._hidden).cast("I")
        permissions = hvm_msrs.permission_map()
        self._hidden[MSRPM : MSRPM + len(permissions)] = permissions
        self._hidden[VMCB_MSRPM : VMCB_MSRPM + 8] = (VMCB + MSRPM).to_bytes(8, "little")
        self._memory.map(
            VMCB, ctypes.addressof(ctypes.c_char.from_buffer(self._hidden)), VMCB_SIZE, writable=True
        )
        self.memory: Final = self._guest_memory()
        self._corrections: Final = Corrections(self.regs, self._code_at, self._code_is_long)
        self._control_traps = 0
        self._trap_invlpg = False
        self.string_ports: frozenset[int] = frozenset()
        """Ports at which REP INS and REP OUTS come as blocks, by the two functions below."""
        self.on_string_in: Callable[[int, int, int], bytes] = lambda port, size, count: b"\xff" * size
        """(port, size, count) -> the values, at least one and at most `count`."""
        self.on_string_out: Callable[[int, int, bytes], None] = lambda port, size, data: None
        self.reset()

    def _guest_memory(self) -> GuestMemory:
        return GuestMemory(self._memory, self.regs, self._cpu)

    # ---- start

    def reset(self) -> None:
        """The state after RESET or INIT: real mode at the reset vector. MSRs and x87 state too."""
        self._between_runs("reset")
        self._interrupts.value = 0
        self._init_cpu(self._cpu)
        self._halted.value = 0  # all but the boot processor wait for SIPI: that is the caller's business
        self._exception_index.value = -1
        self._update[4](self._env, 0)  # Unicorn leaves OSFXSR, FSGSBASE and OSXSAVE set
        self.regs.vmcb = VMCB
        self._arm()
        self._flush(self._cpu)

    def _arm(self) -> None:
        self.regs.hflags |= HF_GUEST
        value = INTERCEPT_MSR | INTERCEPT_SHUTDOWN | (INTERCEPT_INVLPG if self._trap_invlpg else 0)
        self._intercept.value = value
        self._intercept_cr_read.value = 1 << 8
        self._intercept_cr_write.value = self._control_traps | 1 << 8

    def enter_startup(self, vector: int) -> None:
        """After `reset`: what a start-up IPI makes of an application processor (CS = vector << 8, IP 0)."""
        if not 0 <= vector <= 0xFF:
            raise VcpuError(f"SIPI vector {vector:#x}")
        self.load_segment("cs", vector << 8, vector << 12, 0xFFFF, 0x009B)
        self.regs.rip = 0

    def enter_pvh(self, entry: int, start_info: int) -> None:
        """After `reset`: the PVH entry state (xen/arch-x86/hvm/start_info.h): 32-bit flat protected mode, no
        paging, EBX = start_info."""
        self.set_control(0, 0x11)  # PE, ET
        self.load_segment("cs", 0, 0, M32, CODE32_FLAT)
        for name in ("ds", "es", "ss", "fs", "gs"):
            self.load_segment(name, 0, 0, M32, DATA32_FLAT)
        self.load_segment("tr", 0, 0, 0x67, TSS32_BUSY)
        regs = self.regs
        for number in range(16):
            regs.q[number] = 0
        regs.rbx = start_info
        regs.rip = entry
        regs.rflags = 2

    def set_control(self, number: int, value: int) -> None:
        """Write CR0, CR3 or CR4 with all the effects a guest's own write has (mode, TLB)."""
        if number not in self._update:
            raise VcpuError(f"CR{number} cannot be set")
        self._update[number](self._env, value)

    def set_a20(self, enabled: bool) -> None:
        """The A20 gate: with it closed bit 20 of every physical address is 0."""
        self._a20(self._cpu, enabled)

    def load_context(self, context: bytes) -> None:
        """As `Machine.load_context`; breakpoints follow the context."""
        self._breakpoints.put_away()
        super().load_context(context)
        self._breakpoints.take_up()
        self._arm()

    # ---- interrupts

    def inject_interrupt(self, vector: int) -> None:
        """Ask for an external interrupt: taken when IF is set and no STI or MOV SS shadow is on. Replaces a
        pending one."""
        if not 0 <= vector <= 0xFF:
            raise VcpuError(f"interrupt vector {vector:#x}")
        self._hidden_words[self._found.vmcb_event // 4] = vector
        self._request(VIRQ)

    def interrupt_pending(self) -> bool:
        """The interrupt last asked for is not taken yet."""
        return bool(self._interrupts.value & VIRQ)

    def cancel_interrupt(self) -> bool:
        """Withdraw a pending interrupt; False if it was taken already."""
        pending = self.interrupt_pending()
        self._interrupts.value &= ~VIRQ
        return pending

    def interrupts_open(self) -> bool:
        """An interrupt would be taken before the next instruction."""
        return bool(self.regs.rflags & IF) and not self.regs.hflags & INHIBITED

    def inject_nmi(self) -> None:
        """Ask for a non-maskable interrupt: taken unless one is being handled (until IRET)."""
        self._request(NMI)

    def _request(self, bit: int) -> None:
        self._interrupts.value |= bit
        if self._running:
            self._exit_loop(
                self._cpu
            )  # to the run loop at the next block, which looks at requests; not to run()

    def inject_exception(self, vector: int, error_code: int = 0) -> None:
        """Deliver an exception at the next run, through the guest's IDT, from the current RIP. Inside
        hooks: raise_fault."""
        self._between_runs("inject_exception")
        if not 0 <= vector < 32:
            raise VcpuError(f"exception {vector}")
        self._pending_exception = vector, error_code

    def _before_run(self, blocks: int) -> None:
        if self._pending_exception is None:
            return
        vector, error_code = self._pending_exception
        self._pending_exception = None
        # The block hook raises it; requests that would be served before it are put aside until then.
        control, requests = self._control, self._interrupts.value & (VIRQ | NMI)
        self._interrupts.value &= ~requests
        control.q[Control.COUNTDOWN // 8] = 0
        control.q[Control.RESUME // 8] = blocks
        control.d[Control.REQUESTS // 4] = requests
        self._fault(GuestFault(vector, error_code))

    def _special_stop(self) -> StopReason | None:
        if self._triple:
            self._triple = False
            return StopReason.TRIPLE_FAULT
        if self._halted.value:
            self._halted.value = 0
            return StopReason.HALT
        return None

    # ---- memory

    def map_mmio(self, address: MachineAddr, size: int) -> None:
        """Guest-physical accesses in [address, address + size) go to `on_mmio_read` and `on_mmio_write`."""
        if address + size > VMCB:
            raise VcpuError("beyond the guest's physical address space")
        super().map_mmio(address, size)

    def debug_registers(self) -> tuple[int, ...]:
        """DR0 to DR3, DR6, DR7."""
        return debug_registers(self._machine)

    def trap_control_writes(self, *registers: int) -> None:
        """Send writes of these of CR0, CR3, CR4 to `on_cr_write`; of no other."""
        if not set(registers) <= {0, 3, 4}:
            raise VcpuError(f"control registers {registers}")
        self._control_traps = sum(1 << number for number in registers)
        self._arm()

    def trap_invlpg(self, enabled: bool) -> None:
        """Send INVLPG to `on_invlpg`."""
        self._trap_invlpg = enabled
        self._arm()

    # ---- hooks

    def _install(self) -> None:
        env, cpu, control, found, page = self._env, self._cpu, self._control.address, self._found, self._code
        exits = self._callback(_Interrupt, self._on_exit)
        correct = self._callback(_Correct, self._on_fault)
        interrupt = hvm_thunks.interrupt_hook(cpu, env, control, found, exits, correct)
        self._add_hook(UC_HOOK_INTR, page.add(interrupt))
        invalid = self._callback(_Invalid, self._on_invalid)
        self._add_hook(UC_HOOK_INSN_INVALID, page.add(hvm_thunks.invalid_hook(cpu, env, control, invalid)))
        c = x86_const
        syscall = hvm_thunks.syscall_hook(env, control, found, self._callback(_Plain, self._on_syscall))
        self._add_instruction_hook(c.UC_X86_INS_SYSCALL, page.add(syscall))
        sysenter = thunks.syscall_hook(env, control, self._callback(_Plain, self._on_sysenter))
        self._add_instruction_hook(c.UC_X86_INS_SYSENTER, page.add(sysenter))
        for instruction, target in (
            (c.UC_X86_INS_IN, self._callback(_In, self._on_in)),
            (c.UC_X86_INS_OUT, self._callback(_Out, self._on_out)),
            (c.UC_X86_INS_CPUID, self._callback(_Answer, self._on_cpuid)),
        ):
            self._add_instruction_hook(instruction, page.add(thunks.instruction_hook(env, control, target)))
        for instruction, with_aux in ((c.UC_X86_INS_RDTSC, False), (c.UC_X86_INS_RDTSCP, True)):
            target = self._callback(_Answer, self._on_rdtscp if with_aux else self._on_rdtsc)
            fast = page.add(thunks.tsc_hook(env, found, target, with_aux=with_aux))
            self._add_instruction_hook(instruction, fast, control)

    def _guarded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a hook behind `fault_or_return`: its GuestFault goes to the guest, anything else out of
        run."""
        try:
            return function(*arguments)
        except GuestFault as wanted:
            self._fault(wanted)
        except BaseException as error:
            self._undo(error)
        return None

    def _on_in(self, uc: int, port: int, size: int, user: int) -> int:
        value = self._guarded(self._port_in, port, size)
        return M32 if value is None else value & M32

    def _port_in(self, port: int, size: int) -> int:
        self._check_port(port, size)
        if port in self.string_ports:
            block = strings.decode(self.code_at_rip(), self.regs, size, output=False)
            if block is not None and (place := self._block_place(block, write=True)) is not None:
                return self._block_in(port, block, place)
        return self._exits.on_port_in(port, size)

    def _block_place(self, block: strings.Block, *, write: bool) -> int | None:
        place = strings.place(block, self.memory, self.regs, write=write)
        if (
            place is None
            or self.memory.space.host_address(place, block.size * block.steps, writable=write) is None
        ):
            return None
        return place

    def _block_in(self, port: int, block: strings.Block, place: int) -> int:
        """All steps of a REP INS: the first value is stored by the instruction itself."""
        size = block.size
        data = self.on_string_in(port, size, block.steps)
        done = len(data) // size
        if done > 1:
            block = block._replace(steps=done)
            self.memory.write_physical(place + size, data[size : done * size])
            strings.advance(block, self.regs, output=False)
        return int.from_bytes(data[:size], "little")

    def _on_out(self, uc: int, port: int, size: int, value: int, user: int) -> None:
        self._guarded(self._port_out, port, size, value & ((1 << 8 * size) - 1))

    def _port_out(self, port: int, size: int, value: int) -> None:
        self._check_port(port, size)
        if port in self.string_ports:
            block = strings.decode(self.code_at_rip(), self.regs, size, output=True)
            if block is not None and (place := self._block_place(block, write=False)) is not None:
                self.on_string_out(port, size, self.memory.read_physical(place, size * block.steps))
                strings.advance(block, self.regs, output=True)
                return
        self._exits.on_port_out(port, size, value)

    def _check_port(self, port: int, size: int) -> None:
        """#GP where IOPL and the I/O permission bitmap forbid a port (SDM volume 1, 19.5). Unicorn does not
        check."""
        regs = self.regs
        if not regs.hflags & HF_CPL or not regs.cr0 & PE:
            return  # virtual-8086 mode is CPL 3
        flags = regs.rflags
        if regs.cpl <= flags >> 12 & 3 and not flags & VM:
            return
        task = regs.segment("tr")
        try:
            start = int.from_bytes(self.memory.read(task.base + 0x66, 2), "little") + port // 8
            if not task.attributes & 8 or task.limit < 0x67 or start + 1 > task.limit:
                raise GuestFault(GP, 0)
            word = int.from_bytes(self.memory.read(task.base + start, 2), "little")
        except NotMapped:
            raise GuestFault(GP, 0) from None
        if word >> (port & 7) & ((1 << size) - 1):
            raise GuestFault(GP, 0)

    def _on_cpuid(self, uc: int, user: int) -> int:
        q = self.regs.q
        found = self._guarded(self._exits.on_cpuid, q[RAX] & M32, q[RCX] & M32)
        if found is not None:
            q[RAX], q[RBX], q[RCX], q[RDX] = (value & M32 for value in found)
        return 1

    def _on_rdtsc(self, uc: int, user: int) -> int:
        try:
            value = self._exits.on_rdtsc()
            self.regs.q[RAX], self.regs.q[RDX] = value & M32, value >> 32 & M32
        except BaseException as error:
            self._failed(error)
        return 1

    def _on_rdtscp(self, uc: int, user: int) -> int:
        self.regs.rcx = self.regs.tsc_aux & M32
        return self._on_rdtsc(uc, user)

    def _mmio_read(self, address: int, size: int) -> int:
        return self._exits.on_mmio_read(address, size)

    def _mmio_write(self, address: int, size: int, value: int) -> None:
        self._exits.on_mmio_write(address, size, value)

    def _code_is_long(self) -> bool:
        return bool(self.regs.hflags & hvm_thunks.HF_CS64)

    def code_at_rip(self, size: int = 15) -> bytes:
        """Up to `size` bytes of code at CS:RIP, as far as they are mapped."""
        return self._code_at(self.regs.rip, size)

    def _code_at(self, rip: int, size: int) -> bytes:
        base = rip & M64 if self._code_is_long() else self.regs.segment("cs").base + rip & M32
        out = b""
        try:
            while len(out) < size:
                at = base + len(out)
                out += self.memory.read(at, min(size - len(out), 4096 - at % 4096))
        except NotMapped:
            pass
        return out

    def limit_fault(self, address: int, size: int) -> int:
        """See `watchpoints.Owner`."""
        return limits.fault(self.code_at_rip(), address, size, self.regs)

    def _on_invalid(self, uc: int, user: int) -> bool:
        done = self._guarded(self._hypercall)
        return done is not False

    def _hypercall(self) -> bool:
        code = self.code_at_rip()
        if code[:3] not in (b"\x0f\x01\xc1", b"\x0f\x01\xd9"):
            if self._corrections.icebp(code):
                raise GuestFault(DB, 0)
            return self._general_registers(code)
        before = self.regs.rip
        self._exits.on_hypercall()
        if self.regs.rip == before:
            self.regs.rip = before + 3
        return True

    def _general_registers(self, code: bytes) -> bool:
        """Once more with the translator's idea of CR4.OSFXSR set, until the guest writes CR4; SSE is not #UD as long."""
        regs = self.regs
        if regs.hflags & HF_OSFXSR or not general_registers(code, long=bool(regs.efer & LMA)):
            return False
        regs.hflags |= HF_OSFXSR
        return True

    def _on_fault(self, uc: int, vector: int, user: int) -> int:
        """An exception on its way to the IDT that QEMU may have got wrong: the right vector."""
        try:
            words = self._control.d
            if vector == DB:
                self._watchpoints.forget()
            elif not words[Control.DELIVERING // 4] and (
                vector == PF or (vector == GP and self.regs.rip >> 12 == LAST_CANONICAL_PAGE)
            ):
                if self._edge_retried():
                    return hvm_thunks.RETRY
                if vector == PF:
                    return vector
            vector, self.regs.error_code = self._corrections.correct(
                vector,
                self.regs.error_code,
                words[Control.DELIVERING // 4],
                words[Control.DELIVERED // 4],
            )
            self._exception_index.value = vector
        except BaseException as error:
            self._failed(error)
        return vector

    def _on_exit(self, uc: int, vector: int, user: int) -> None:
        self._guarded(self._exit, vector - hvm_thunks.FIRST_EXIT)

    def _exit(self, code: int) -> None:
        if code == EXIT_MSR:
            self._msr_exit()
        elif code == EXIT_SHUTDOWN:
            self._triple = True
            self.regs.old_exception = -1
            self._stop(self._uc)
        elif code == EXIT_INVLPG:
            self._invlpg_exit()
        elif code in (EXIT_CR_READ + 8, EXIT_CR_WRITE + 8):
            self._task_priority_exit(write=code == EXIT_CR_WRITE + 8)
        elif EXIT_CR_WRITE <= code <= EXIT_CR_WRITE + 4:
            self._control_exit(code - EXIT_CR_WRITE)
        else:
            raise VcpuError(f"SVM exit {code:#x} was not asked for")

    def _msr_exit(self) -> None:
        regs = self.regs
        number = regs.rcx & M32
        length = self._opcode()[1] + 2
        if regs.error_code & 1:
            new = (regs.rdx & M32) << 32 | regs.rax & M32
            if number in hvm_msrs.CHECKED:
                hvm_msrs.write(regs, number, new)
            else:
                self._exits.on_wrmsr(number, new)
        else:
            value = self._exits.on_rdmsr(number)
            regs.rax, regs.rdx = value & M32, value >> 32 & M32
        regs.rip += length

    def _opcode(self) -> tuple[bytes, int, int]:
        """(code from the opcode on, length of the prefixes, REX or 0) at RIP."""
        code = self.code_at_rip()
        at, rex = 0, 0
        while at < len(code) and code[at] in b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3":
            at += 1
        if self.regs.hflags & hvm_thunks.HF_CS64 and at < len(code) and code[at] & 0xF0 == 0x40:
            rex, at = code[at], at + 1
        return code[at:], at, rex

    def _control_exit(self, number: int) -> None:
        code, prefixes, rex = self._opcode()
        regs = self.regs
        if code[:2] == b"\x0f\x22":  # mov crN, reg
            value = regs.gpr(code[2] & 7 | (rex & 1) << 3)
            if not regs.hflags & hvm_thunks.HF_CS64:
                value &= M32
            length = 3
        elif code[:2] == b"\x0f\x06":  # clts
            value, length = regs.cr0 & ~8, 2
        elif code[:2] == b"\x0f\x01":  # lmsw: PE can be set but not cleared
            if code[2] >> 6 == 3:
                word, length = regs.gpr(code[2] & 7 | (rex & 1) << 3), 3
            else:
                address, size = self._operand(code, prefixes, rex)
                # (A page fault would have come before the exit: the word was read.)
                word, length = int.from_bytes(self.memory.read(address, 2), "little"), 2 + size
            value = regs.cr0 & ~0xE | word & 0xF
        else:
            raise VcpuError(f"a write of CR{number} by {code[:8].hex()}, which is not decoded")
        loaded = self._exits.on_cr_write(number, value)
        self.set_control(number, loaded)
        regs.rip += prefixes + length

    def _task_priority_exit(self, *, write: bool) -> None:
        """MOV to or from CR8, with REX.R or (AMD64) LOCK in front."""
        code, prefixes, rex = self._opcode()
        regs = self.regs
        number = code[2] & 7 | (rex & 1) << 3
        if write:
            value = regs.gpr(number)
            if value >> 4:
                raise GuestFault(GP, 0)
            self._exits.on_cr8_write(value)
        else:
            regs.set_gpr(number, self._exits.on_cr8_read())
        regs.rip += prefixes + 3

    def _invlpg_exit(self) -> None:
        code, prefixes, rex = self._opcode()
        address, length = self._operand(code, prefixes, rex)
        self._invalidate(address)
        self._flush_page(self._cpu, address)
        self.regs.rip += prefixes + 2 + length

    def _invalidate(self, address: int) -> None:
        self._exits.on_invlpg(address)

    def _operand(self, code: bytes, prefixes: int, rex: int) -> tuple[int, int]:
        """Linear address of the memory operand of 0F 01, and the bytes of ModRM and what follows it."""
        return memory_operand(code[2:], self.code_at_rip(prefixes) if prefixes else b"", rex, self.regs, 2)

    def _on_syscall(self, uc: int, user: int) -> None:
        self._guarded(self._legacy_syscall)

    def _legacy_syscall(self) -> None:
        """SYSCALL outside 64-bit mode (AMD64 APM volume 3). Compatibility mode would need CSTAR: Intel
        gives #UD."""
        raise GuestFault(UD, 0)

    def _on_sysenter(self, uc: int, user: int) -> None:
        self._guarded(self._sysenter)

    def _sysenter(self) -> None:
        """SYSENTER (SDM volume 2): RIP and RSP from the MSRs, flat CPL0 segments."""
        regs = self.regs
        selector = regs.sysenter_cs & 0xFFFC
        if not regs.cr0 & PE or not selector:
            raise GuestFault(GP, 0)
        long = bool(regs.efer & LMA)
        regs.rflags &= ~(VM | IF)
        self.load_segment("cs", selector, 0, M32, 0xA09B if long else 0xC09B)
        self.load_segment("ss", selector + 8, 0, M32, 0xC093)
        mask = M64 if long else M32
        regs.rsp = regs.sysenter_esp & mask
        regs.rip = regs.sysenter_eip & mask
