"""The hypercall page of a 64-bit PV guest: stub n, 32 bytes long at n * 32, makes hypercall n.

A stub keeps RCX and R11, which SYSCALL overwrites; Xen gives all other registers but RAX back. `iret` does
not come back: its frame (struct iret_context in xen-x86_64.h) begins with RAX, R11 and RCX, which its stub
therefore pushes.
"""

from __future__ import annotations

import struct
from typing import Final

from bus.abi import xen
from bus.addresses import PAGE_SIZE

_STUB: Final = 32
_INT3: Final = b"\xcc"
_PUSH_RCX_R11: Final = b"\x51\x41\x53"
_PUSH_RAX: Final = b"\x50"
_MOV_EAX: Final = b"\xb8"
_SYSCALL: Final = b"\x0f\x05"
_POP_R11_RCX_RET: Final = b"\x41\x5b\x59\xc3"


def _stub(number: int) -> bytes:
    load = _MOV_EAX + struct.pack("<I", number)
    if number == xen.HYPERVISOR_iret:
        return _PUSH_RCX_R11 + _PUSH_RAX + load + _SYSCALL
    return _PUSH_RCX_R11 + load + _SYSCALL + _POP_R11_RCX_RET


PV_HYPERCALL_PAGE: Final = b"".join(_stub(number).ljust(_STUB, _INT3) for number in range(PAGE_SIZE // _STUB))
"""The page's 4096 bytes."""
