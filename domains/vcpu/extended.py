"""x87 and SSE state in the layout of FXSAVE64 (Intel SDM volume 1, 10.5.1; AMD64 APM volume 2, 11.4.4)."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from unicorn import UC_ERR_OK, x86_const

from domains.vcpu.api import VcpuError
from domains.vcpu.insides import error_text, library

SIZE: Final = 512
MXCSR_MASK: Final = 0xFFFF
"""Bits of MXCSR that exist."""
_SMALL: Final = ("FPCW", "FPSW", "FPTAG", "MXCSR", "FOP", "FIP", "FDP")
"""Written in this order: the ST registers that follow are counted from the top of stack in FPSW."""
_HEADER: Final = struct.Struct("<HHBxHQQII")
_SLOT: Final = 16


class ExtendedState:
    """Reads and writes the state with one call of the public batch functions (a few microseconds)."""

    def __init__(self, uc: int) -> None:
        lib = library()
        c = x86_const
        ids = [getattr(c, f"UC_X86_REG_{name}") for name in _SMALL]
        ids += [c.UC_X86_REG_ST0 + i for i in range(8)] + [c.UC_X86_REG_XMM0 + i for i in range(16)]
        self._uc: Final = uc
        self._count: Final = len(ids)
        self._ids: Final = (ctypes.c_int * self._count)(*ids)
        self._buffer: Final = (ctypes.c_uint8 * (_SLOT * self._count))()
        base = ctypes.addressof(self._buffer)
        self._pointers: Final = (ctypes.c_void_p * self._count)(
            *(base + _SLOT * i for i in range(self._count))
        )
        self._view: Final = memoryview(self._buffer).cast("B")
        types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
        self._read = lib.held("uc_reg_read_batch", ctypes.c_int, *types)
        self._write = lib.held("uc_reg_write_batch", ctypes.c_int, *types)

    def save(self) -> bytes:
        """The 512 bytes that FXSAVE64 would store."""
        self._view[:] = bytes(len(self._buffer))
        _ok(self._read(self._uc, self._ids, self._pointers, self._count))
        fcw, fsw, tag, mxcsr, fop, fip, fdp = (
            int.from_bytes(self._view[_SLOT * i : _SLOT * i + 8], "little") for i in range(len(_SMALL))
        )
        abridged = sum(1 << i for i in range(8) if tag >> 2 * i & 3 != 3)
        header = _HEADER.pack(
            fcw & 0xFFFF, fsw & 0xFFFF, abridged, fop & 0x7FF, fip, fdp, mxcsr & MXCSR_MASK, MXCSR_MASK
        )
        start = _SLOT * len(_SMALL)
        stack = b"".join(bytes(self._view[start + _SLOT * i :][:10]) + bytes(6) for i in range(8))
        xmm = bytes(self._view[start + _SLOT * 8 :])
        return (header + stack + xmm).ljust(SIZE, b"\0")

    def load(self, state: bytes) -> None:
        """Take over an FXSAVE image. VcpuError if it is short or sets bits of MXCSR that do not exist (on
        hardware that is #GP)."""
        if len(state) < SIZE:
            raise VcpuError(f"an FXSAVE image of {len(state)} bytes")
        fcw, fsw, abridged, fop, fip, fdp, mxcsr, _ = _HEADER.unpack_from(state)
        if mxcsr & ~MXCSR_MASK:
            raise VcpuError(f"MXCSR {mxcsr:#x} has reserved bits")
        tag = sum(3 << 2 * i for i in range(8) if not abridged >> i & 1)
        for i, value in enumerate((fcw, fsw, tag, mxcsr, fop, fip, fdp)):
            self._view[_SLOT * i : _SLOT * i + 8] = value.to_bytes(8, "little")
        start = _SLOT * len(_SMALL)
        for i in range(8):
            at = start + _SLOT * i
            self._view[at : at + 10] = state[32 + 16 * i : 42 + 16 * i]
        self._view[start + _SLOT * 8 :] = state[160:416]
        _ok(self._write(self._uc, self._ids, self._pointers, self._count))


def _ok(error: int) -> None:
    if error != UC_ERR_OK:
        raise VcpuError(f"x87/SSE state: {error_text(error)}")
