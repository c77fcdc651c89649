"""Records of the grant tables: the hypervisor's own, which decide what is safe, whatever a guest's memory says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from bus.abi.grant_table import GNTMAP_readonly, GTF_reading, GTF_writing
from bus.addresses import DomId, Gfn, GrantRef, Mfn

PIN_LIMIT: Final = 127
"""Most mappings of one kind of one entry (Xen's counters have seven bits and a guard bit)."""
INVALID_HANDLE: Final = 0xFFFF_FFFF
GRACE_NS: Final = 20_000_000
"""An order of another's map or unmap that is carried out within this costs a granter nothing."""
PATIENCE_NS: Final = 5_000_000_000
"""So much of others' time beyond that a granter may take in a row..."""
REGAIN: Final = 5
"""... and one part in so many of the time that passes in the long run."""

EntryKey = tuple[DomId, GrantRef]


@dataclass(slots=True)
class ActiveEntry:
    """What is mapped by one grant entry, and which bits its granter was told to set in it."""

    granter: DomId
    ref: GrantRef
    grantee: DomId
    mfn: Mfn
    host_read: int = 0
    host_write: int = 0
    device_read: int = 0
    device_write: int = 0
    bits: int = 0
    """GTF_reading and GTF_writing as they stand in the granter's entry, by our orders."""
    window_bits: int = 0
    """Bits that must stay while the frame is in a window of which the grantee has a descriptor: an unmapped grant is
    in use until the frame has left that window."""

    @property
    def pins(self) -> int:
        return self.host_read + self.host_write + self.device_read + self.device_write

    @property
    def pinned_for_write(self) -> bool:
        return bool(self.host_write + self.device_write)

    @property
    def needed_bits(self) -> int:
        """What the entry must show."""
        bits = self.window_bits
        if self.pins:
            bits |= GTF_reading
        if self.pinned_for_write:
            bits |= GTF_writing
        return bits

    def count(self, readonly: bool, host: bool, device: bool, step: int) -> None:
        """Count a mapping in (+1) or out (-1)."""
        if host and readonly:
            self.host_read += step
        elif host:
            self.host_write += step
        if device and readonly:
            self.device_read += step
        elif device:
            self.device_write += step

    @property
    def full(self) -> bool:
        """One of the counters has no room."""
        return max(self.host_read, self.host_write, self.device_read, self.device_write) >= PIN_LIMIT


@dataclass(slots=True)
class Mapping:
    """A maptrack entry: one map operation that succeeded, or is about to."""

    handle: int
    mapper: DomId
    granter: DomId
    ref: GrantRef
    mfn: Mfn
    flags: int
    host_addr: int
    host: bool
    """A mapping for the CPU exists."""
    device: bool
    """A mapping for devices exists."""
    live: bool = False
    """The map operation is complete: the handle may be used."""
    dma_page: Gfn | None = None
    """Where it is in the mapper's I/O page tables."""
    window: int = 0
    index: int = 0

    @property
    def readonly(self) -> bool:
        return bool(self.flags & GNTMAP_readonly)


@dataclass(slots=True)
class Window:
    """A memfd of frames granted together."""

    number: int
    granter: DomId
    size: int
    live: set[Mfn] = field(default_factory=set)
    """Frames whose content is in it now."""
    rights: dict[DomId, bool] = field(default_factory=dict)
    """Domains that have, or may have kept, a descriptor of it: with write access or without."""


@dataclass(slots=True)
class Table:
    """One domain's grant table and maptrack."""

    domain: DomId
    max_grant_frames: int
    max_maptrack: int
    max_version: int = 2
    version: int = 1
    shared: list[Mfn] = field(default_factory=list)
    status: list[Mfn] = field(default_factory=list)
    active: dict[GrantRef, ActiveEntry] = field(default_factory=dict)
    maptrack: dict[int, Mapping] = field(default_factory=dict)
    free_handles: list[int] = field(default_factory=list)
    next_handle: int = 0
    epoch: int = 0
    """Counts `release_mappings`: a map that was under way then does not come about."""
    unresponsive: int = 0
    """Maps whose deadline its process missed, and which it has not undone yet."""
    taken_ns: int = 0
    """Of others' time, at `taken_at`: see PATIENCE_NS."""
    taken_at: int = 0
    put_off: bool = False
    """It was more than the patience with it when it was last looked at."""

    def took(self, now: int, ns: int) -> None:
        """Its process has had an order for so long, while somebody else waited."""
        left = max(0, self.taken_ns - (now - self.taken_at) // REGAIN)
        self.taken_ns, self.taken_at = min(left + max(0, ns - GRACE_NS), 2 * PATIENCE_NS), now

    def wears_out(self, now: int) -> bool:
        """It took too much of others' time: what needs its process is put off for now."""
        return self.taken_ns - (now - self.taken_at) // REGAIN > PATIENCE_NS

    @property
    def entries(self) -> int:
        """How many entries the table has."""
        return len(self.shared) * (512 if self.version == 1 else 256)

    def take_handle(self) -> int:
        """A free maptrack handle, or INVALID_HANDLE if the limit is reached."""
        if self.free_handles:
            return self.free_handles.pop()
        if self.next_handle >= self.max_maptrack:
            return INVALID_HANDLE
        self.next_handle += 1
        return self.next_handle - 1

    def drop_handle(self, handle: int) -> None:
        """The handle is free again."""
        self.maptrack.pop(handle, None)
        self.free_handles.append(handle)


def status_frames(grant_frames: int) -> int:
    """Status frames that go with so many frames of a version 2 table (2 bytes an entry)."""
    return -(-grant_frames // 8)
