"""Device processes: their links, staging memory and doorbells; joins them to `hypervisor.core.devices`."""

from __future__ import annotations

import itertools
import mmap
import os
from dataclasses import dataclass
from typing import Any, Final

from bus import sealed
from bus.addresses import PAGE_SIZE, Bdf, DomId, Mfn
from bus.dma_lane import HypervisorEnd
from bus.doorbell import Doorbell
from bus.messages.device import Attach, DeviceHello
from bus.packets import close_all
from hypervisor.shell.memory import MemfdMemory
from hypervisor.shell.peers import Peer, PeerLost

STAGING_BYTES: Final = 16 << 20
MAX_DOORBELL_BYTES: Final = 1 << 20
DEVICE_BASE: Final = 0x8000_0000
"""Peers that are devices are numbered from here, by their PCI address."""


def peer_id(bdf: Bdf) -> DomId:
    """The number by which the shell knows a device's process."""
    return DomId(DEVICE_BASE | bdf)


def is_device(peer: int) -> bool:
    """The number is a device's."""
    return bool(peer & DEVICE_BASE)


def address_of(peer: int) -> Bdf:
    """The reverse of `peer_id`."""
    return Bdf(peer & ~DEVICE_BASE)


class MemfdStaging:
    """Implements `hypervisor.core.iommu_dma.Staging`: a memfd shared with one device process."""

    def __init__(self, memory: MemfdMemory, bdf: Bdf, size: int = STAGING_BYTES) -> None:
        self.size = size
        self.fd = sealed.create(f"domicile-staging-{bdf:x}", size)
        self._mapping = mmap.mmap(self.fd, size)
        self._view = memoryview(self._mapping)
        self._memory = memory

    def to_frames(self, position: int, mfn: Mfn, offset: int, length: int) -> None:
        """See Staging: one copy."""
        if offset + length <= PAGE_SIZE:
            view, start = self._memory.place_of(mfn)
            start += offset
            view[start : start + length] = self._view[position : position + length]
            return
        for view, start, size in self._memory.places(mfn, offset, length):
            view[start : start + size] = self._view[position : position + size]
            position += size

    def from_frames(self, mfn: Mfn, offset: int, position: int, length: int) -> None:
        """See Staging: one copy."""
        if offset + length <= PAGE_SIZE:
            view, start = self._memory.place_of(mfn)
            start += offset
            self._view[position : position + length] = view[start : start + length]
            return
        for view, start, size in self._memory.places(mfn, offset, length):
            self._view[position : position + size] = view[start : start + size]
            position += size

    def close(self) -> None:
        """Give it back."""
        self._view.release()
        self._mapping.close()
        os.close(self.fd)


@dataclass(slots=True)
class _Slot:
    name: str
    role: str
    staging: MemfdStaging


class DeviceShell:
    """What the server does for devices."""

    def __init__(self, memory: MemfdMemory) -> None:
        self._memory = memory
        self.slots: dict[Bdf, _Slot] = {}
        self._bundles = itertools.count(1 << 32)

    def plug(self, bdf: Bdf, role: str, name: str) -> MemfdStaging:
        """Staging memory for a new process of that device."""
        self.unplug(bdf)
        staging = MemfdStaging(self._memory, bdf)
        self.slots[bdf] = _Slot(name, role, staging)
        return staging

    def unplug(self, bdf: Bdf) -> None:
        """The process is gone for good, or before a new one."""
        slot = self.slots.pop(bdf, None)
        if slot is not None:
            slot.staging.close()

    def attach(
        self, attach: Attach, hello: DeviceHello, device: Peer, owner: Peer | None, doorbells: bool
    ) -> PeerLost | None:
        """Send `Attach` with its descriptors, and the other ends of the doorbells to the owner. PeerLost is the device's; the owner's is
        returned. With `doorbells` it gets a new DMA lane, too."""
        slot = self.slots.get(Bdf(attach.bdf))
        if slot is None:
            return None
        fds, ranges, shared = [slot.staging.fd], list[dict[str, Any]](), list[int]()
        own: list[int] = []
        try:
            if doorbells:
                for bar in hello.bars:
                    if (
                        not 0 < bar.doorbell_length <= MAX_DOORBELL_BYTES
                        or bar.doorbell_length % mmap.PAGESIZE
                    ):
                        continue
                    page = sealed.create(f"domicile-doorbell-{attach.bdf:x}-{bar.index}", bar.doorbell_length)
                    rings, listens = Doorbell.pair()
                    own += [page, rings.fd, listens.fd]
                    fds += [page, listens.fd]
                    shared += [page, rings.fd]
                    ranges.append(
                        {"bar": bar.index, "offset": bar.doorbell_offset, "length": bar.doorbell_length}
                    )
                lane, theirs = HypervisorEnd.pair()
                device.set_lane(lane)
                own.append(theirs.detach())
                fds.append(own[-1])
            device.send_with(
                attach.model_copy(update={"descriptors": len(fds), "lane": doorbells}),
                fds,
            )
            if owner is not None:
                body = {
                    "bdf": attach.bdf,
                    "epoch": attach.epoch,
                    "doorbells": ranges,
                    "bars": [[bar.index, bar.size] for bar in hello.bars],
                    "vectors": hello.vectors,
                }
                try:
                    owner.order(0, "device_attached", body, shared)
                except PeerLost as lost:
                    return lost
            return None
        finally:
            close_all(own)


__all__ = ["DeviceShell", "MemfdStaging", "PeerLost", "address_of", "is_device", "peer_id"]
