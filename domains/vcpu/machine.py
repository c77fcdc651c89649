"""What PV and HVM vCPUs share: a Unicorn instance with its run loop, memory, hooks and contexts.

One instance serves all vCPUs of a domain in turn: `save_context` and `load_context` switch between them.
They share the translated code and the memory map, and take turns on one thread (atomic instructions are
atomic then).
"""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from unicorn import UC_ERR_OK, UC_HOOK_BLOCK, UC_HOOK_INSN, UC_HOOK_MEM_INVALID, unicorn_const

from bus.addresses import MachineAddr
from domains.vcpu import accessed, bases, insides, thunks, watchpoints
from domains.vcpu.api import BadAccess, GuestFault, StopReason, VcpuError
from domains.vcpu.breakpoints import Breakpoints
from domains.vcpu.extended import ExtendedState
from domains.vcpu.features import usable
from domains.vcpu.memory import PhysicalMap, Region
from domains.vcpu.state import Segment, view
from domains.vcpu.stores import make_stores_fast
from domains.vcpu.thunks import Control

CPU_EXTRA: Final = 12
"""Bytes of a context behind the CPU state: halted, interrupt_request, exception_index."""
EXCP_INTERRUPT: Final = 0x10000
"""QEMU's number for "leave the run loop" among its exceptions."""
ONE_INSTRUCTION: Final = 1
"""As flags of a block to translate."""
LAST_CANONICAL_PAGE: Final = (1 << 47) - 1 >> 12
TSC_ONE: Final = 1 << 32
"""The multiplier of a guest whose TSC runs as the host's."""

_WRITES: Final = (
    unicorn_const.UC_MEM_WRITE,
    unicorn_const.UC_MEM_WRITE_UNMAPPED,
    unicorn_const.UC_MEM_WRITE_PROT,
)
_FETCHES: Final = (
    unicorn_const.UC_MEM_FETCH,
    unicorn_const.UC_MEM_FETCH_UNMAPPED,
    unicorn_const.UC_MEM_FETCH_PROT,
)
_patched = threading.Lock()

_MemoryHook = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)

_MmioRead = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
)
_MmioWrite = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
)
_ONES: Final = (1 << 64) - 1


class Machine(ABC):
    """The parts common to both kinds of vCPU. See `domains.vcpu.api.Vcpu` for the contract of each method."""

    def __init__(self) -> None:
        found = self._found = insides.offsets()
        lib = insides.library()
        with _patched:
            thunks.make_barriers_real()
            accessed.accessed_when_allowed()
            make_stores_fast(found.uc_cpu)
            watchpoints.fill(found.cpu_interrupt_request)
        self._machine: Final = insides.open_machine()
        self._uc: Final = insides.uc_address(self._machine)
        self._cpu: Final = insides.cpu_address(self._machine, found)
        self._env: Final = insides.env_address(self._machine, found)
        with _patched:
            bases.check_bases(self._env - self._cpu)
        # From here on Unicorn leaves translated code only at the start of a block, never inside an
        # instruction.
        ctypes.c_uint8.from_address(self._uc + found.uc_no_exit_request).value = 1
        self.regs: Final = view(self._env, found)
        self.bad_access: BadAccess | None = None
        self._control: Final = thunks.ControlPage()
        self._code: Final = thunks.CodePage()
        self._memory: Final = PhysicalMap(self._uc, self._cpu)
        self._extended: Final = ExtendedState(self._uc)
        self._halted: Final = ctypes.c_uint32.from_address(self._cpu + found.cpu_halted)
        self._interrupts: Final = ctypes.c_uint32.from_address(self._cpu + found.cpu_interrupt_request)
        self._exception_index: Final = ctypes.c_int32.from_address(self._cpu + found.cpu_exception_index)
        self._watchpoints: Final = watchpoints.Watchpoints(self._cpu, found.cpu_interrupt_request, self)
        self._watch_hit: Final = self._watchpoints.hit
        self._next_flags: Final = ctypes.c_uint32.from_address(self._cpu + watchpoints.next_flags_offset())
        self._edge: tuple[int, int] | None = None
        self._breakpoints: Final = Breakpoints(self._machine, self._env)
        self._memory.undisturbed = self._undisturbed
        self._memory.map_device = self._map_device
        self._mmio: tuple[int, int] | None = None
        self._context_size: Final = found.uc
        self._running = False
        self._requested = False
        self._error: BaseException | None = None
        self._callbacks: list[Any] = []  # ctypes callbacks must outlive their hooks
        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        self._start = lib.releasing("uc_emu_start", ctypes.c_int, pointer, u64, u64, u64, ctypes.c_size_t)
        self._stop = lib.held("uc_emu_stop", ctypes.c_int, pointer)
        self._flush = lib.held("tlb_flush_x86_64", None, pointer)
        self._flush_page = lib.held("tlb_flush_page_x86_64", None, pointer, u64)
        self._update_hflags = lib.held("x86_update_hflags_x86_64", None, pointer)
        u32 = ctypes.c_uint32
        self._cpuid = lib.held("cpu_x86_cpuid_x86_64", None, pointer, u32, u32, *(pointer,) * 4)
        self._control.q[Control.TSC_MULTIPLIER // 8] = TSC_ONE
        code = self._code
        tsc = ctypes.PYFUNCTYPE(u64)
        host = code.add(thunks.host_tsc_function())
        guest = code.add(thunks.guest_tsc_function(self._control.address))
        block = thunks.block_hook(self._env, self._cpu + found.cpu_interrupt_request)
        self._add_hook(UC_HOOK_BLOCK, code.add(block), self._control.address)
        bad = self._callback(_MemoryHook, self._on_bad_access)
        thunk = thunks.instruction_hook(self._env, self._control.address, bad)
        self._add_hook(UC_HOOK_MEM_INVALID, code.add(thunk))
        self._install()
        code.seal()
        self.host_tsc: Final[Callable[[], int]] = tsc(host)
        """The host's time stamp counter (0.1 us)."""
        self.guest_tsc: Final[Callable[[], int]] = tsc(guest)
        """What RDTSC gives in the guest now: the same formula, the same counter."""

    # ---- running

    def run(self, blocks: int) -> StopReason:
        """See `Vcpu.run`. VcpuError if Unicorn stops for a reason it should not have, or when called inside
        a hook.

        An exception that a hook raised comes out here, after the guest stopped cleanly.
        """
        if self._running:
            raise VcpuError("run called inside a hook")
        if blocks <= 0:
            raise VcpuError(f"a slice of {blocks} blocks")
        words = self._control.q
        if self._control.d[Control.BELL // 4]:
            return StopReason.BELL
        words[Control.COUNTDOWN // 8] = blocks
        self._before_run(blocks)
        self._requested = False
        self.bad_access = None
        self._running = True
        try:
            error = self._start(self._uc, self.regs.rip, 0, 0, 0)
        finally:
            self._running = False
            if self._watch_hit.value:
                self._watchpoints.between_runs(put_off=bool(self._control.d[Control.PUT_OFF // 4]))
                self._control.d[Control.PUT_OFF // 4] = 0
        return self._reason(error)

    def _reason(self, error: int) -> StopReason:
        if self._error is not None:
            raised, self._error = self._error, None
            raise raised
        if self.bad_access is not None:
            return StopReason.BAD_ACCESS
        if error != UC_ERR_OK:
            raise VcpuError(f"Unicorn: {insides.error_text(error)} at RIP {self.regs.rip:#x}")
        if self._requested:
            return StopReason.REQUESTED
        special = self._special_stop()
        if special is not None:
            return special
        if self._control.d[Control.BELL // 4]:
            return StopReason.BELL
        if self._control.q[Control.COUNTDOWN // 8] >> 63:
            return StopReason.SLICE
        return self._unexplained_stop()

    def _before_run(self, blocks: int) -> None:  # noqa: B027  # one kind has nothing to do here
        """What one kind of guest does before each run."""

    def _edge_retried(self) -> bool:
        """A fetch from the page behind RIP's faulted, maybe while a block in front of it was translated: RIP is at the block's first
        instruction then, and none of it has run. True: the hook is to return, and that instruction runs alone; so one after the other, until
        the one that really faults."""
        tried = self.regs.rip, self._control.q[Control.COUNTDOWN // 8]
        if tried == self._edge:
            self._edge = None
            return False
        self._edge = tried
        self._next_flags.value = ONE_INSTRUCTION
        return True

    def put_off(self) -> bool:
        """MOV SS or POP SS has hit a data breakpoint: #DB comes behind the next instruction. False: that was another instruction, which is
        over (an exception of its own leaves the shadow on). Inside `run`; must not raise."""
        rip, words = self.regs.rip, self._control
        if self._watchpoints.put_off_at not in (None, rip):
            return False
        self._watchpoints.put_off_at = rip
        left = words.q[Control.COUNTDOWN // 8]
        if not left >> 63:  # else this run is ending
            words.q[Control.RESUME // 8] = left
            words.q[Control.COUNTDOWN // 8] = 0
        words.d[Control.PUT_OFF // 4] = 1
        return True

    def limit_fault(self, address: int, size: int) -> int:
        """See `watchpoints.Owner`: only HVM guests have 32-bit code."""
        return 0

    def _special_stop(self) -> StopReason | None:
        """A reason that only one kind of guest has."""
        return None

    def _unexplained_stop(self) -> StopReason:
        raise VcpuError(f"Unicorn stopped for no reason that is known, at RIP {self.regs.rip:#x}")

    def request_stop(self) -> None:
        """See `Vcpu.request_stop`."""
        self._requested = True
        self._stop(self._uc)

    def ring(self) -> None:
        """See `Vcpu.ring`: one store to a word that the block hook reads."""
        self._control.d[Control.BELL // 4] = 1

    def clear_bell(self) -> None:
        """See `Vcpu.clear_bell`."""
        self._control.d[Control.BELL // 4] = 0

    @property
    def bell_address(self) -> int:
        """Host address of the bell word (u32), for code that rings without Python."""
        return self._control.address + Control.BELL

    def raise_fault(self, vector: int, error_code: int = 0) -> NoReturn:
        """See `Vcpu.raise_fault`."""
        raise GuestFault(vector, error_code)

    # ---- memory

    def map(self, address: MachineAddr, host_address: int, size: int, *, writable: bool = True) -> None:
        """See `Vcpu.map`."""
        self._memory.map(address, host_address, size, writable=writable)
        self._flush(self._cpu)

    def unmap(self, address: MachineAddr, size: int) -> None:
        """See `Vcpu.unmap`."""
        self._memory.unmap(address, size)
        self._flush(self._cpu)

    def protect(self, address: MachineAddr, size: int, *, writable: bool) -> None:
        """See `Vcpu.protect`."""
        self._memory.protect(address, size, writable=writable)
        self._flush(self._cpu)

    def map_mmio(self, address: MachineAddr, size: int) -> None:
        """Physical accesses in [address, address + size) go to `_mmio_read` and `_mmio_write` of the kind of vCPU."""
        self._memory.map_mmio(address, size)
        self._flush(self._cpu)

    def _map_device(self, region: Region) -> int:
        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        add = insides.library().held(
            "uc_mmio_map", ctypes.c_int, pointer, u64, ctypes.c_size_t, pointer, pointer, pointer, pointer
        )
        if self._mmio is None:
            self._mmio = (
                self._callback(_MmioRead, self._on_mmio_read),
                self._callback(_MmioWrite, self._on_mmio_write),
            )
        read, write = self._mmio
        base = region.start or None
        return int(add(self._uc, region.start, region.end - region.start, read, base, write, base))

    def _mmio_read(self, address: int, size: int) -> int:
        """A read of a device region; all ones where there is no device."""
        return _ONES

    def _mmio_write(  # noqa: B027  # lost, unless a kind of vCPU does more
        self, address: int, size: int, value: int
    ) -> None:
        """A write to a device region; lost where there is no device."""

    def _on_mmio_read(self, uc: int, offset: int, size: int, user: int | None) -> int:
        try:
            return self._mmio_read((user or 0) + offset, size) & _ONES
        except BaseException as error:
            self._failed(error)
        return _ONES

    def _on_mmio_write(self, uc: int, offset: int, size: int, value: int, user: int | None) -> None:
        try:
            self._mmio_write((user or 0) + offset, size, value & ((1 << 8 * size) - 1))
        except BaseException as error:
            self._failed(error)

    def flush_tlb(self) -> None:
        """See `Vcpu.flush_tlb`."""
        self._flush(self._cpu)

    def flush_page(self, address: int) -> None:
        """Forget the cached translation of one page of guest-virtual addresses, as INVLPG does."""
        self._flush_page(self._cpu, address)

    def drop_code(self, address: MachineAddr, size: int) -> None:
        """See `Vcpu.drop_code`."""
        self._memory.drop_code(address, size)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """What an exception leaves behind is as before afterwards."""
        r = self.regs
        before = r.cr2, r.old_exception, r.error_code, r.exception_is_int, r.exception_next_eip
        index = self._exception_index.value
        try:
            yield
        finally:
            r.cr2, r.old_exception, r.error_code, r.exception_is_int, r.exception_next_eip = before
            self._exception_index.value = index

    # ---- state

    def load_segment(self, name: str, selector: int, base: int, limit: int, attributes: int) -> None:
        """See `Vcpu.load_segment`."""
        if name not in insides.SEGMENT_NAMES:
            raise VcpuError(f"no segment register {name!r}")
        self.regs.set_segment(name, Segment(selector, base, limit, attributes))
        if name in ("cs", "ss", "ds", "es"):
            self._update_hflags(self._env)

    def save_extended(self) -> bytes:
        """See `Vcpu.save_extended`."""
        return self._extended.save()

    def load_extended(self, state: bytes) -> None:
        """See `Vcpu.load_extended`."""
        self._extended.load(state)

    def save_context(self) -> bytes:
        """The whole state of the vCPU that this instance holds now (about 7 KB), for `load_context`."""
        self._between_runs("save_context")
        return ctypes.string_at(self._env, self._context_size) + b"".join(
            cell.value.to_bytes(4, "little", signed=cell is self._exception_index)
            for cell in (self._halted, self._interrupts, self._exception_index)
        )

    def load_context(self, context: bytes) -> None:
        """Hold another vCPU: a context of this same object; cached translations are forgotten.

        VcpuError if it has another size. The bytes are trusted: they hold host pointers of this instance.
        """
        self._between_runs("load_context")
        size = self._context_size
        if len(context) != size + CPU_EXTRA:
            raise VcpuError(f"a context of {len(context)} bytes, not {size + CPU_EXTRA}")
        ctypes.memmove(self._env, context, size)
        for number, cell in enumerate((self._halted, self._interrupts, self._exception_index)):
            at = size + 4 * number
            cell.value = int.from_bytes(context[at : at + 4], "little", signed=cell is self._exception_index)
        self._watchpoints.forget()
        self._flush(self._cpu)

    def _between_runs(self, what: str) -> None:
        if self._running:
            raise VcpuError(f"{what} called inside a hook")

    def native_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX of what this vCPU can execute: the base for every CPUID policy (2 us)."""
        out = (ctypes.c_uint32 * 4)()
        at = ctypes.addressof(out)
        self._cpuid(self._env, leaf, subleaf, at, at + 4, at + 8, at + 12)
        return usable(leaf, subleaf, (out[0], out[1], out[2], out[3]))

    # ---- time

    def set_tsc(self, *, offset: int, multiplier: int = TSC_ONE) -> None:
        """The guest's TSC = (host TSC x multiplier >> 32) + offset, modulo 2**64."""
        if not 0 < multiplier < 1 << 64:
            raise VcpuError(f"TSC multiplier {multiplier}")
        self._control.q[Control.TSC_MULTIPLIER // 8] = multiplier
        self._control.q[Control.TSC_OFFSET // 8] = offset & ((1 << 64) - 1)

    def trap_tsc(self, enabled: bool) -> None:
        """RDTSC and RDTSCP go to the hook `on_rdtsc` (half a microsecond) instead of machine code."""
        self._control.d[Control.TSC_TRAP // 4] = enabled

    # ---- hooks

    @abstractmethod
    def _install(self) -> None:
        """Add the hooks of this kind of vCPU; the code pages are sealed afterwards."""

    def _callback(self, prototype: Any, function: Callable[..., Any]) -> int:
        """Address of a C function that calls `function`, which must not raise."""
        callback = prototype(function)
        self._callbacks.append(callback)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        assert address is not None
        return address

    def _add_hook(self, kind: int, address: int, user: int = 0, instruction: int | None = None) -> None:
        handle = ctypes.c_size_t()
        add = insides.library().held("uc_hook_add", ctypes.c_int)
        add.argtypes = None  # variadic: each argument carries its own type
        arguments = [
            ctypes.c_void_p(self._uc),
            ctypes.byref(handle),
            ctypes.c_int(kind),
            ctypes.c_void_p(address),
            ctypes.c_void_p(user),
            ctypes.c_uint64(1),  # begin > end: everywhere
            ctypes.c_uint64(0),
        ]
        if instruction is not None:
            arguments.append(ctypes.c_int(instruction))
        error = add(*arguments)
        if error != UC_ERR_OK:
            raise VcpuError(f"hook {kind}: {insides.error_text(error)}")

    def _add_instruction_hook(self, instruction: int, address: int, user: int = 0) -> None:
        self._add_hook(UC_HOOK_INSN, address, user, instruction)

    def _failed(self, error: BaseException) -> None:
        """A hook raised: keep the first exception for `run`, and stop."""
        if self._error is None:
            self._error = error
        self._stop(self._uc)

    def _undo(self, error: BaseException) -> None:
        """The hook of an instruction raised: as `_failed`, and the instruction has not happened (RIP at
        it)."""
        self._failed(error)
        self._leave()

    def _leave(self) -> None:
        """From a hook behind `thunks.instruction_hook` that has called for a stop: leave the run loop with
        RIP at the instruction.

        Without this the rest of the block would run: that exit is switched off by no_exit_request.
        """
        words = self._control.d
        words[Control.FAULT_VECTOR // 4] = EXCP_INTERRUPT
        words[Control.FAULT_ERROR // 4] = 0
        words[Control.FAULT // 4] = 1

    def _fault(self, fault: GuestFault) -> None:
        """A hook asked for an exception instead of its instruction: the thunk raises it."""
        words = self._control.d
        words[Control.FAULT_VECTOR // 4] = fault.vector & 0xFF
        words[Control.FAULT_ERROR // 4] = fault.error_code & 0xFFFFFFFF
        words[Control.FAULT // 4] = 1

    def _on_bad_access(self, uc: int, kind: int, address: int, size: int, value: int, user: int) -> bool:
        self.bad_access = BadAccess(address, size, kind in _WRITES)
        self._stop(self._uc)
        if kind not in _FETCHES:
            self._leave()
        return False
