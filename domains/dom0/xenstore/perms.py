"""Permissions of a node: a list whose first entry names the owner and what everybody else may do; each
further entry says what one domain may do. The first entry that names a domain counts.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from domains.dom0.xenstore.errors import XsError

NONE: Final = 0
READ: Final = 1
WRITE: Final = 2
OWNER: Final = 4
ALL: Final = READ | WRITE | OWNER

_LETTERS: Final = {b"n": NONE, b"r": READ, b"w": WRITE, b"b": READ | WRITE}
_NAMES: Final = {bits: letter for letter, bits in _LETTERS.items()}
_ENTRY: Final = re.compile(rb"([nrwb])([0-9]{1,5})")
DOMID_MAX: Final = 0xFFFF
"""domid_t has 16 bits."""


class Perm(NamedTuple):
    """One entry: NONE, READ, WRITE or READ | WRITE for one domain."""

    domid: int
    bits: int


Perms = tuple[Perm, ...]
"""At least one entry; the first is the owner's."""


def parse(text: bytes) -> Perm:
    """An entry from its text ("r3"). XsError EINVAL."""
    match = _ENTRY.fullmatch(text)
    if match is None or int(match[2]) > DOMID_MAX:
        raise XsError("EINVAL")
    return Perm(int(match[2]), _LETTERS[match[1]])


def to_text(perm: Perm) -> bytes:
    """An entry as its text."""
    return _NAMES[perm.bits] + b"%d" % perm.domid


def access(perms: Perms, domid: int, target: int | None) -> int:
    """What a caller may do: domain 0 and the owner everything, others by the list. A caller with a target
    (SET_TARGET) counts as that domain too.
    """
    owner = perms[0]
    if domid == 0 or owner.domid == domid or (target is not None and owner.domid == target):
        return ALL
    for perm in perms[1:]:
        if perm.domid == domid or perm.domid == target:
            return perm.bits
    return owner.bits


def without(perms: Perms, domid: int) -> Perms:
    """The list without the further entries of a domain (the owner stays)."""
    return perms[:1] + tuple(perm for perm in perms[1:] if perm.domid != domid)
