"""The accessed bit of a page of 1 GiB is set by an access that may be, as a processor does, and by no other.

QEMU's walk sets the bit in an entry of the third level before it looks whether that is a page, and so before it asks for the rights. One
byte of the test is changed: the bit is not set there if the entry is a page; the end of the walk sets it then, as for all other pages.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
from typing import Final

from domains.vcpu.insides import UnknownUnicorn, described, library
from domains.vcpu.thunks import PAGE, protect

ACCESSED, LARGE = 0x20, 0x80
# test al, ACCESSED; je set; mov r14, [rsp + d]; mov r8, r11; test al, LARGE; je
_TEST: Final = re.compile(
    rb"\xa8([\x20\xa0])\x0f\x84....\x4c\x8b\x74\x24.\x4d\x89\xd8\xa8\x80\x0f\x84", re.DOTALL
)
_WALK: Final = "x86_cpu_tlb_fill_x86_64"
_WALK_BYTES: Final = 0xB00


@functools.cache
def accessed_when_allowed() -> None:
    """Once a process, before any vCPU runs. UnknownUnicorn if the library is not the one that is known."""
    lib = library()
    found = list(_TEST.finditer(lib.code(_WALK, _WALK_BYTES)))
    if len(found) != 1:
        raise UnknownUnicorn(f"{described()}: the walk of the third level is not as expected")
    at = lib.address(_WALK) + found[0].start(1)
    page = at & ~(PAGE - 1)
    protect(page, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        ctypes.c_uint8.from_address(at).value = ACCESSED | LARGE
    finally:
        protect(page, PAGE, mmap.PROT_READ | mmap.PROT_EXEC)
