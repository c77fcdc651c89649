"""Xen's ELF notes (elfnote.h), and the older `__xen_guest` string: what a kernel says about how to start
it."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from bus.abi import elfnote, features

from .elf import ElfImage
from .errors import BuildError

MAX_NOTES: Final = 256
MAX_STRING: Final = 4096
_M64: Final = (1 << 64) - 1

FEATURES: Final[dict[str, int]] = {
    name.removeprefix("XENFEAT_"): bit
    for name, bit in vars(features).items()
    if name.startswith("XENFEAT_") and name != "XENFEAT_NR_SUBMAPS"
}
"""Every feature of features.h: its name without the prefix, and its bit."""

_NUMERIC: Final = {
    elfnote.XEN_ELFNOTE_ENTRY: "entry",
    elfnote.XEN_ELFNOTE_HYPERCALL_PAGE: "hypercall_page",
    elfnote.XEN_ELFNOTE_VIRT_BASE: "virt_base",
    elfnote.XEN_ELFNOTE_PADDR_OFFSET: "paddr_offset",
    elfnote.XEN_ELFNOTE_HV_START_LOW: "hv_start_low",
    elfnote.XEN_ELFNOTE_SUSPEND_CANCEL: "suspend_cancel",
    elfnote.XEN_ELFNOTE_INIT_P2M: "init_p2m",
    elfnote.XEN_ELFNOTE_MOD_START_PFN: "mod_start_pfn",
    elfnote.XEN_ELFNOTE_PHYS32_ENTRY: "phys32_entry",
}
_STRINGS: Final = {
    elfnote.XEN_ELFNOTE_XEN_VERSION: "xen_version",
    elfnote.XEN_ELFNOTE_GUEST_OS: "guest_os",
    elfnote.XEN_ELFNOTE_GUEST_VERSION: "guest_version",
    elfnote.XEN_ELFNOTE_LOADER: "loader",
    elfnote.XEN_ELFNOTE_PAE_MODE: "pae_mode",
    elfnote.XEN_ELFNOTE_BSD_SYMTAB: "bsd_symtab",
}
_LEGACY_NUMERIC: Final = {
    "VIRT_BASE": "virt_base",
    "VIRT_ENTRY": "entry",
    "ELF_PADDR_OFFSET": "paddr_offset",
    "INIT_P2M": "init_p2m",
}
_LEGACY_STRINGS: Final = {
    "XEN_VER": "xen_version",
    "GUEST_OS": "guest_os",
    "GUEST_VER": "guest_version",
    "LOADER": "loader",
    "PAE": "pae_mode",
}


@dataclass(frozen=True, slots=True)
class XenNotes:
    """What the notes say; None for a numeric note that is absent, "" for a string."""

    entry: int | None = None
    hypercall_page: int | None = None
    """Virtual address of the hypercall page."""
    virt_base: int | None = None
    paddr_offset: int | None = None
    hv_start_low: int | None = None
    suspend_cancel: int | None = None
    init_p2m: int | None = None
    mod_start_pfn: int | None = None
    phys32_entry: int | None = None
    xen_version: str = ""
    guest_os: str = ""
    guest_version: str = ""
    loader: str = ""
    pae_mode: str = ""
    bsd_symtab: str = ""
    l1_mfn_valid: tuple[tuple[int, int], ...] = ()
    """(mask, value) pairs that tell non-present L1 entries which carry an MFN."""
    supported: frozenset[str] = frozenset()
    """Features (names as in features.h) that the kernel can use, the required ones included."""
    required: frozenset[str] = frozenset()
    legacy: bool = False
    """They came from a `__xen_guest` section."""


def find_notes(image: ElfImage) -> XenNotes | None:
    """Xen's notes of a kernel: from its PT_NOTE segments, else its note sections, else `__xen_guest`; None
    without any.

    BuildError: a note that does not parse, a required feature of unknown name, or more than MAX_NOTES notes.
    """
    for places in (image.note_segments, image.note_sections):
        found = [note for place in places for note in _xen_notes(place)]
        if len(found) > MAX_NOTES:
            raise BuildError(f"kernel: {len(found)} Xen ELF notes (at most {MAX_NOTES})")
        if found:
            return _from_elf(found)
    if image.guest_section is not None:
        return _from_legacy(bytes(image.guest_section))
    return None


def _xen_notes(place: memoryview) -> Iterable[tuple[int, bytes]]:
    """(type, description) of each note named "Xen"; stops where the data stops making sense, as a linker's
    padding does."""
    offset = 0
    while offset + 12 <= len(place):
        name_size, size, kind = struct.unpack_from("<III", place, offset)
        name = offset + 12
        start = name + (name_size + 3 & ~3)
        if start + size > len(place):
            return
        if (
            bytes(place[name : name + min(name_size, 4)]) == b"Xen\0"
            and kind <= elfnote.XEN_ELFNOTE_PHYS32_ENTRY
        ):
            yield kind, bytes(place[start : start + size])
        offset = start + (size + 3 & ~3)


def _from_elf(found: list[tuple[int, bytes]]) -> XenNotes:
    numbers: dict[str, int] = {}
    strings: dict[str, str] = {}
    pairs: list[tuple[int, int]] = []
    supported, required = set[str](), set[str]()
    for kind, data in found:
        if kind in _NUMERIC:
            numbers[_NUMERIC[kind]] = _number(kind, data)
        elif kind in _STRINGS:
            strings[_STRINGS[kind]] = _string(kind, data)
        elif kind == elfnote.XEN_ELFNOTE_FEATURES:
            some, needed = parse_features(_string(kind, data))
            supported |= some
            required |= needed
        elif kind == elfnote.XEN_ELFNOTE_SUPPORTED_FEATURES:
            bits = _number(kind, data)
            supported |= {name for name, bit in FEATURES.items() if bits >> bit & 1}
        elif kind == elfnote.XEN_ELFNOTE_L1_MFN_VALID:
            if len(data) % 16 or len(data) > MAX_STRING:
                raise BuildError(f"kernel: Xen ELF note L1_MFN_VALID has {len(data)} bytes, not pairs of 8")
            pairs += struct.iter_unpack("<QQ", data)
    notes = XenNotes(l1_mfn_valid=tuple(pairs), supported=frozenset(supported), required=frozenset(required))
    return replace(notes, **numbers, **strings)  # type: ignore[arg-type]  # the tables above name fields of these types


def _number(kind: int, data: bytes) -> int:
    if len(data) not in (1, 2, 4, 8):
        raise BuildError(f"kernel: Xen ELF note {kind} has {len(data)} bytes, not a number of 4 or 8")
    return int.from_bytes(data, "little")


def _string(kind: int, data: bytes) -> str:
    if len(data) > MAX_STRING:
        raise BuildError(
            f"kernel: Xen ELF note {kind} is a string of {len(data)} bytes (at most {MAX_STRING})"
        )
    return data.split(b"\0", 1)[0].decode("latin-1")


def parse_features(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """(supported, required) of a features string: names separated by `|`, `!` before each one that is
    required.

    An unknown name is ignored, as Xen does, unless it is required: BuildError.
    """
    supported, required = set[str](), set[str]()
    for item in text.split("|"):
        needed = item.startswith("!")
        name = item[1:] if needed else item
        if not name:
            continue
        if name in FEATURES:
            supported.add(name)
            if needed:
                required.add(name)
        elif needed:
            raise BuildError(f"kernel: requires a Xen feature that is unknown here: {name[:64]!r}")
    return frozenset(supported), frozenset(required)


def _from_legacy(data: bytes) -> XenNotes:
    """`NAME=value,NAME=value,NAME`: numbers in C's notation, HYPERCALL_PAGE a page number relative to
    VIRT_BASE's page 0."""
    if len(data) > MAX_STRING:
        raise BuildError(f"kernel: __xen_guest has {len(data)} bytes (at most {MAX_STRING})")
    text = data.split(b"\0", 1)[0].decode("latin-1")
    fields = dict(item.partition("=")[::2] for item in text.split(",") if item)
    numbers: dict[str, int] = {}
    for key, name in _LEGACY_NUMERIC.items():
        if key in fields:
            numbers[name] = _legacy_number(key, fields[key])
    # Without it, the old interface takes physical addresses to be offset by VIRT_BASE (elfnote.h).
    numbers.setdefault("paddr_offset", numbers.get("virt_base", 0))
    if "HYPERCALL_PAGE" in fields:
        page = _legacy_number("HYPERCALL_PAGE", fields["HYPERCALL_PAGE"])
        numbers["hypercall_page"] = numbers.get("virt_base", 0) + (page << 12) & _M64
    strings = {name: fields[key] for key, name in _LEGACY_STRINGS.items() if key in fields}
    if "BSD_SYMTAB" in fields:
        strings["bsd_symtab"] = "yes"
    supported, required = parse_features(fields.get("FEATURES", ""))
    notes = XenNotes(supported=supported, required=required, legacy=True)
    return replace(notes, **numbers, **strings)  # type: ignore[arg-type]  # as in _from_elf


def _legacy_number(key: str, text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise BuildError(f"kernel: __xen_guest: {key} is not a number: {text[:64]!r}") from None
    if not 0 <= value <= _M64:
        raise BuildError(f"kernel: __xen_guest: {key} does not fit 64 bits")
    return value
