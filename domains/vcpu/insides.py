"""Where the pinned Unicorn keeps its CPU state: offsets derived from its own machine code, verified at start.

The library exports all its internal functions. The displacement in an instruction such as
`mov ecx, [rdi + disp32]` of `x86_cpu_do_interrupt` *is* the offset of `error_code`; reading it there is
exact for the very file that is loaded. What has no such witness (the general registers, the segment caches,
the control registers) is expected where QEMU 5.0 lays it out and proved by a probe: a pattern written to the
CPU state must be what the public API reads back. Anything unexpected raises `UnknownUnicorn`.

Nothing here is used for a Unicorn that fails one check: a wrong offset would corrupt the process silently.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from typing import Any, Final, NamedTuple

import unicorn
import unicorn.unicorn_py3.arch.intel  # else loaded with the first instance: out of a process's reach by then (bus.process.begin)
from unicorn import UC_ARCH_X86, UC_MODE_64, x86_const
from unicorn.unicorn_py3 import unicorn as binding

from domains.vcpu.api import VcpuError

_package: Any = unicorn  # it ships no type information
VERSION: Final = "2.1.4"
"""The release of `unicorn` this package was written against and pins."""


TRANSLATIONS_BYTES: Final = 12 << 20
"""Room for translated code; when it is full, all of it is dropped and what runs is translated anew. Unicorn's own choice is 1 GiB, which
a guest could fill. Debian's boot translates some 30 MB and is no slower with this (docs/performance.md)."""


class UnknownUnicorn(VcpuError):
    """The Unicorn library that is installed is not laid out as the one this code knows."""


class Fixed:
    """Byte offsets in QEMU 5.0's CPUX86State that the probe verifies. `SegmentCache` is 24 bytes: selector
    u32 +0, base u64 +8, limit u32 +16, flags u32 +20 (bits 8..23 as in a descriptor's upper half)."""

    REGS = 0
    RIP = 128
    RFLAGS = 136
    CC_DST = 144
    CC_SRC = 152
    CC_SRC2 = 160
    CC_OP = 168
    DF = 172
    HFLAGS = 176
    HFLAGS2 = 180
    SEGMENTS = 184
    LDTR = 328
    TR = 352
    GDTR = 376
    IDTR = 400
    CR = 424


SEGMENT_SIZE: Final = 24
SEGMENT_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr", "gdtr", "idtr")
"""In the order of the CPU state, from `Fixed.SEGMENTS` on."""


class Offsets(NamedTuple):
    """Byte offsets found in the loaded library."""

    uc_cpu: int
    """In `uc_struct`: pointer to the CPU object."""
    uc_no_exit_request: int
    """In `uc_struct`: byte; 1 leaves only the exit checks at the start of a block."""
    cpu_env: int
    """In the CPU object: pointer to the CPU state (CPUX86State)."""
    cpu_exception_index: int
    cpu_halted: int
    cpu_interrupt_request: int
    """In the CPU object."""
    error_code: int
    exception_is_int: int
    exception_next_eip: int
    old_exception: int
    vmcb: int
    vmcb_event: int
    """`vmcb` is in the CPU state; `vmcb_event` is the offset in the VMCB of the virtual interrupt's
    vector."""
    uc: int
    """In the CPU state: pointer back to `uc_struct`; what lies before it is the state of one vCPU."""
    tsc_offset: int
    efer: int
    star: int
    lstar: int
    fmask: int
    kernel_gs_base: int
    tsc_aux: int
    sysenter_cs: int
    sysenter_esp: int
    sysenter_eip: int


# One row a witness: (field, exported function, bytes searched, pattern with one group of 1 or 4 bytes). The
# comment is the instruction.
_D = rb"(....)"
_WITNESSES: Final[tuple[tuple[str, str, int, bytes], ...]] = (
    ("uc_cpu", "uc_reg_read", 0x70, rb"\x48\x8b\x83" + _D),  # mov rax, [rbx+d]
    ("cpu_env", "uc_reg_read", 0x70, rb"\x48\x8b\xb8" + _D),  # mov rdi, [rax+d]
    (
        "uc_no_exit_request",
        "check_exit_request_x86_64",
        0x18,
        rb"\x80\xbe" + _D + rb"\x00",
    ),  # cmp byte [rsi+d], 0
    ("cpu_exception_index", "x86_cpu_do_interrupt_x86_64", 0x10, rb"\x8b\xb7" + _D),  # mov esi, [rdi+d]
    ("_error_code", "x86_cpu_do_interrupt_x86_64", 0x18, rb"\x8b\x8f" + _D),  # mov ecx, [rdi+d]
    ("_env", "x86_cpu_do_interrupt_x86_64", 0x30, rb"\x48\x8d\xbf" + _D),  # lea rdi, [rdi+d]
    ("_is_int", "x86_cpu_do_interrupt_x86_64", 0x40, rb"\x8b\x97" + _D),  # mov edx, [rdi+d]
    ("_next_eip", "x86_cpu_do_interrupt_x86_64", 0x40, rb"\x4c\x8b\x87" + _D),  # mov r8, [rdi+d]
    (
        "_old",
        "x86_cpu_do_interrupt_x86_64",
        0x60,
        rb"\xc7\x83" + _D + rb"\xff\xff\xff\xff",
    ),  # mov dword [rbx+d], -1
    (
        "cpu_interrupt_request",
        "x86_cpu_exec_interrupt_x86_64",
        0x1A0,
        rb"\x81\x65(.)\xff\xfe\xff\xff",
    ),  # and [rbp+d], ~0x100
    (
        "_vmcb",
        "x86_cpu_exec_interrupt_x86_64",
        0x1A0,
        rb"\x48\x8b\x85" + _D + rb"\x48\x89\xef\x48\x8d\x70",
    ),  # mov rax, [rbp+d]; mov rdi, rbp; lea rsi, [rax+d8]
    ("vmcb_event", "x86_cpu_exec_interrupt_x86_64", 0x1A0, rb"\x48\x89\xef\x48\x8d\x70(.)"),
    ("_hflags2", "x86_cpu_exec_interrupt_x86_64", 0x1A0, rb"\x83\x8d" + _D + rb"\x04"),  # or dword [rbp+d], 4
    ("_rflags", "x86_cpu_exec_enter_x86_64", 0x10, rb"\x48\x8b\x87" + _D),  # mov rax, [rdi+d]
    (
        "_cc_op",
        "x86_cpu_exec_enter_x86_64",
        0x20,
        rb"\xc7\x87" + _D + rb"\x01\x00\x00\x00",
    ),  # mov dword [rdi+d], 1
    ("_cc_src", "x86_cpu_exec_enter_x86_64", 0x30, rb"\x48\x89\x97" + _D),  # mov [rdi+d], rdx
    ("_df", "x86_cpu_exec_enter_x86_64", 0x48, rb"\x89\x8f" + _D),  # mov [rdi+d], ecx
    ("uc", "helper_rdtsc_x86_64", 0x20, rb"\x4c\x8b\xb7" + _D),  # mov r14, [rdi+d]
    ("_hflags", "helper_rdtsc_x86_64", 0x28, rb"\xf6\x87" + _D + rb"\x03"),  # test byte [rdi+d], 3 (CPL)
    ("tsc_offset", "helper_rdtsc_x86_64", 0x120, rb"\x49\x03\x84\x24" + _D),  # add rax, [r12+d]
)

# Code that thunks rely on: the length of SYSCALL and SYSENTER is in r13 while their hooks run.
_LENGTH_IN_R13: Final = b"\x4c\x63\xee"  # movsxd r13, esi
_ADVANCE_BY_R13: Final = b"\x4c\x01\xe9"  # add rcx, r13
# tcg_gen_mb: test byte [rdi+0x66], 8; jne +0xa; ret. Makes MFENCE nothing unless CF_PARALLEL is set.
_GEN_MB: Final = re.compile(rb"\xf6\x47.\x08\x75.\xc3", re.DOTALL)

_MSRS: Final = {
    "star": 0xC0000081,
    "lstar": 0xC0000082,
    "fmask": 0xC0000084,
    "kernel_gs_base": 0xC0000102,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
}


class Library:
    """The loaded libunicorn: addresses of its functions, and the ones that are called from Python.

    Functions under `held` keep the interpreter lock (they take well under a microsecond and are called
    inside hooks); `run` gives it up.
    """

    def __init__(self) -> None:
        name: str = binding.uclib._name
        self._cdll: Final = ctypes.CDLL(name)
        self._pydll: Final = ctypes.PyDLL(name)

    def address(self, function: str) -> int:
        """Address of an exported function. UnknownUnicorn if there is none of that name."""
        try:
            value = ctypes.cast(getattr(self._cdll, function), ctypes.c_void_p).value
        except AttributeError:
            raise UnknownUnicorn(f"{described()} does not export {function}") from None
        assert value is not None
        return value

    def code(self, function: str, size: int) -> bytes:
        """The first bytes of an exported function."""
        return ctypes.string_at(self.address(function), size)

    def releasing(self, function: str, result: Any, *arguments: Any) -> Any:
        """A function called without the interpreter lock."""
        return self._typed(self._cdll, function, result, arguments)

    def held(self, function: str, result: Any, *arguments: Any) -> Any:
        """A function called with the interpreter lock held."""
        return self._typed(self._pydll, function, result, arguments)

    def _typed(self, dll: Any, function: str, result: Any, arguments: tuple[Any, ...]) -> Any:
        self.address(function)
        found = dll[function]  # indexing makes a new function object: its types are its own
        found.restype, found.argtypes = result, arguments
        return found


def described() -> str:
    """The Unicorn that is loaded, for messages."""
    major, minor = _package.uc_version()[:2]
    return f"Unicorn {_package.__version__} (library {major}.{minor}, {binding.uclib._name})"


@functools.cache
def library() -> Library:
    """The one loaded library."""
    return Library()


@functools.cache
def offsets() -> Offsets:
    """Offsets of the loaded library, derived and verified once a process (about 3 ms).

    Raises UnknownUnicorn, naming the version that was found.
    """
    if _package.__version__ != VERSION:
        raise UnknownUnicorn(f"{described()}: this program needs unicorn=={VERSION}")
    found = _derive(library())
    machine = open_machine()
    env = env_address(machine, found)
    found.update(_find_msrs(machine, env, found["uc"]))
    result = Offsets(**{k: v for k, v in found.items() if not k.startswith("_")})
    _probe(machine, env, result)
    return result


def open_machine() -> Any:
    """A new x86 instance (`unicorn.Uc`, which ships no types), its CPU created, without any address as an
    end."""
    machine: Any = _package.Uc(UC_ARCH_X86, UC_MODE_64)
    machine.ctl_set_tcg_buffer_size(TRANSLATIONS_BYTES)
    machine.ctl_exits_enabled(True)
    machine.ctl_set_exits([])
    machine.reg_read(x86_const.UC_X86_REG_RIP)
    return machine


def error_text(error: int) -> str:
    """Unicorn's words for its error number."""
    return str(_package.UcError(error))


def uc_address(machine: Any) -> int:
    """Address of `uc_struct`."""
    handle = machine._uch
    value = handle.value if hasattr(handle, "value") else handle
    if not value:
        raise UnknownUnicorn(f"{described()}: the binding does not tell its handle")
    return int(value)


def cpu_address(machine: Any, found: Offsets | dict[str, int]) -> int:
    """Address of the CPU object."""
    offset = found["uc_cpu"] if isinstance(found, dict) else found.uc_cpu
    return ctypes.c_uint64.from_address(uc_address(machine) + offset).value


def env_address(machine: Any, found: Offsets | dict[str, int]) -> int:
    """Address of the CPU state."""
    offset = found["cpu_env"] if isinstance(found, dict) else found.cpu_env
    return ctypes.c_uint64.from_address(cpu_address(machine, found) + offset).value


def _derive(lib: Library) -> dict[str, int]:
    found: dict[str, int] = {}
    for field, function, size, pattern in _WITNESSES:
        match = re.search(pattern, lib.code(function, size), re.DOTALL)
        if match is None:
            raise UnknownUnicorn(f"{described()}: {function} does not show where {field.strip('_')} is")
        found[field] = int.from_bytes(match.group(1), "little")
    env = found["_env"]
    for field, hidden in (
        ("error_code", "_error_code"),
        ("exception_is_int", "_is_int"),
        ("exception_next_eip", "_next_eip"),
        ("old_exception", "_old"),
        ("vmcb", "_vmcb"),
    ):
        found[field] = found[hidden] - env
    # CPUState: ..., u32 halted, u32 can_do_io, i32 exception_index (QEMU 5.0, hw/core/cpu.h).
    found["cpu_halted"] = found["cpu_exception_index"] - 8
    for name, at, expected in (
        ("rflags", found["_rflags"] - env, Fixed.RFLAGS),
        ("cc_op", found["_cc_op"] - env, Fixed.CC_OP),
        ("cc_src", found["_cc_src"] - env, Fixed.CC_SRC),
        ("df", found["_df"] - env, Fixed.DF),
        ("hflags", found["_hflags"], Fixed.HFLAGS),
        ("hflags2", found["_hflags2"] - env, Fixed.HFLAGS2),
    ):
        if at != expected:
            raise UnknownUnicorn(f"{described()}: {name} at {at} of the CPU state, not at {expected}")
    for function in ("helper_syscall_x86_64", "helper_sysenter_x86_64"):
        code = lib.code(function, 0x100)
        if _LENGTH_IN_R13 not in code or _ADVANCE_BY_R13 not in code:
            raise UnknownUnicorn(f"{described()}: {function} does not keep the instruction's length in r13")
    if not all(0 < value < 0x10000 for value in found.values()):
        raise UnknownUnicorn(f"{described()}: an offset out of all proportion: {found}")
    return found


def _find_msrs(machine: Any, env: int, size: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, (name, msr) in enumerate(_MSRS.items()):
        pattern = 0x0000_1A5C_3D00_0000 | number << 8 | 0x5A
        before = machine.msr_read(msr)
        machine.msr_write(msr, pattern)
        at = ctypes.string_at(env, size).find(struct.pack("<Q", pattern))
        machine.msr_write(msr, before)
        if at < 0:
            raise UnknownUnicorn(f"{described()}: MSR {msr:#x} is not in the CPU state")
        found[name] = at
    # MSRs of 32 bits, or with fixed bits: the neighbours in the structure, proved by writing memory and
    # reading the MSR.
    found["sysenter_cs"] = found["sysenter_esp"] - 8
    for name, msr, pattern, candidates in (
        ("sysenter_cs", 0x174, 0x5A35, (found["sysenter_cs"],)),
        ("tsc_aux", 0xC0000103, 0x35A5C31D, tuple(range(0, size - 8, 8))),
        ("efer", 0xC0000080, 0x901, (592, *range(0, size - 8, 8))),
    ):
        for at in candidates:
            cell = ctypes.c_uint64.from_address(env + at)
            saved = cell.value
            if saved not in (0, 0x500) and name != "sysenter_cs":
                continue
            cell.value = pattern
            hit = machine.msr_read(msr) == pattern
            cell.value = saved
            if hit:
                found[name] = at
                break
        else:
            raise UnknownUnicorn(f"{described()}: MSR {msr:#x} is not in the CPU state")
    return found


def _probe(machine: Any, env: int, found: Offsets) -> None:
    """Write a pattern to each expected place and read it back by the public API."""
    c = x86_const
    places: list[tuple[str, int, int, Any]] = [
        (name, getattr(c, f"UC_X86_REG_{name.upper()}"), 8 * index, ctypes.c_uint64)
        for index, name in enumerate(
            ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
        )
    ]
    places += [
        ("rip", c.UC_X86_REG_RIP, Fixed.RIP, ctypes.c_uint64),
        ("cr0", c.UC_X86_REG_CR0, Fixed.CR, ctypes.c_uint64),
        ("cr2", c.UC_X86_REG_CR2, Fixed.CR + 16, ctypes.c_uint64),
        ("cr3", c.UC_X86_REG_CR3, Fixed.CR + 24, ctypes.c_uint64),
        ("cr4", c.UC_X86_REG_CR4, Fixed.CR + 32, ctypes.c_uint64),
    ]
    for index, name in enumerate(SEGMENT_NAMES[:6]):
        at = Fixed.SEGMENTS + SEGMENT_SIZE * index
        places.append((name, getattr(c, f"UC_X86_REG_{name.upper()}"), at, ctypes.c_uint16))
        if name in ("fs", "gs"):
            places.append(
                (f"{name}_base", getattr(c, f"UC_X86_REG_{name.upper()}_BASE"), at + 8, ctypes.c_uint64)
            )
    for number, (name, register, at, kind) in enumerate(places):
        cell = kind.from_address(env + at)
        saved = cell.value
        cell.value = pattern = (0x1357_9BDF_0000_0000 | 0x2460 + 7 * number) & (
            (1 << 8 * ctypes.sizeof(kind)) - 1
        )
        seen = machine.reg_read(register)
        cell.value = saved
        if seen != pattern:
            raise UnknownUnicorn(f"{described()}: {name} is not at {at} of the CPU state")
    for name, register, at in (
        ("ldtr", c.UC_X86_REG_LDTR, Fixed.LDTR),
        ("tr", c.UC_X86_REG_TR, Fixed.TR),
        ("gdtr", c.UC_X86_REG_GDTR, Fixed.GDTR),
        ("idtr", c.UC_X86_REG_IDTR, Fixed.IDTR),
    ):
        base = ctypes.c_uint64.from_address(env + at + 8)
        limit = ctypes.c_uint32.from_address(env + at + 16)
        saved = base.value, limit.value
        base.value, limit.value = 0x1234_5000 + at, 0x700 + at
        seen = machine.reg_read(register)
        base.value, limit.value = saved
        if tuple(seen)[1:3] != (0x1234_5000 + at, 0x700 + at):
            raise UnknownUnicorn(f"{described()}: {name} is not at {at} of the CPU state")
    no_exit = ctypes.c_uint8.from_address(uc_address(machine) + found.uc_no_exit_request)
    if no_exit.value != 0:
        raise UnknownUnicorn(f"{described()}: no_exit_request is not 0 in a new instance")
    if ctypes.c_uint64.from_address(env + found.uc).value != uc_address(machine):
        raise UnknownUnicorn(f"{described()}: the CPU state does not point back to its instance")
    if ctypes.c_int32.from_address(cpu_address(machine, found) + found.cpu_exception_index).value != -1:
        raise UnknownUnicorn(f"{described()}: exception_index is not -1 in a new instance")


def barrier_patch(lib: Library) -> tuple[int, bytes, bytes] | None:
    """Where and how `tcg_gen_mb` is changed so that MFENCE becomes a fence of the host: (address, old, new).

    The stock library translates a memory barrier to nothing while it believes that no other CPU shares the
    memory. The conditional jump behind that test becomes an unconditional one. None if it is changed already.
    """
    address = lib.address("tcg_gen_mb_x86_64")
    code = ctypes.string_at(address, 7)
    if code[4] == 0xEB:
        return None
    if not _GEN_MB.fullmatch(code):
        raise UnknownUnicorn(f"{described()}: tcg_gen_mb begins with {code.hex()}")
    return address + 4, b"\x75", b"\xeb"


__all__ = [
    "SEGMENT_NAMES",
    "SEGMENT_SIZE",
    "VERSION",
    "Fixed",
    "Library",
    "Offsets",
    "UnknownUnicorn",
    "barrier_patch",
    "cpu_address",
    "described",
    "env_address",
    "error_text",
    "library",
    "offsets",
    "open_machine",
    "uc_address",
]
