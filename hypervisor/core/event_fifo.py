"""The FIFO event ABI's share of the hypervisor: which frames hold control blocks and the event array.

The words themselves are written by the domain's own process. The hypervisor holds a reference on each frame
so that it cannot be used for something else while events are queued through it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import EINVAL, ENOSPC, ENOSYS, EOPNOTSUPP

from bus.abi.event_channel import (
    EVTCHN_FIFO_CONTROL_BLOCK,
    EVTCHN_FIFO_NR_CHANNELS,
    EVTCHN_FIFO_PRIORITY_MIN,
)
from bus.addresses import PAGE_SIZE, Mfn
from hypervisor.core.domains import Domain
from hypervisor.core.errors import XenError
from hypervisor.core.frames import FrameTable
from hypervisor.core.p2m import P2mType

WORDS_PER_PAGE = PAGE_SIZE // 4
MAX_PAGES = EVTCHN_FIFO_NR_CHANNELS // WORDS_PER_PAGE


def guest_frame(frames: FrameTable, domain: Domain, gfn: int) -> Mfn:
    """The domain's own writable RAM frame behind a frame number as its guest gives it. EINVAL if there is
    none."""
    mfn = gfn
    if domain.p2m is not None:
        entry = domain.p2m.get(gfn)
        if entry is None or entry.type is not P2mType.RAM:
            raise XenError(EINVAL)
        mfn = entry.mfn
    if not frames.is_ram_of(mfn, domain.domid):
        raise XenError(EINVAL)
    return Mfn(mfn)


@dataclass(slots=True)
class FifoState:
    """Frames that a domain registered."""

    control: dict[int, tuple[Mfn, int]] = field(default_factory=dict)
    """vCPU -> (frame, offset) of its control block."""
    array: list[Mfn] = field(default_factory=list)

    def add_control_block(self, frames: FrameTable, domain: Domain, gfn: int, offset: int, vcpu: int) -> None:
        """EVTCHNOP_init_control for one vCPU."""
        if offset > PAGE_SIZE - EVTCHN_FIFO_CONTROL_BLOCK.size or offset & 7 or vcpu in self.control:
            raise XenError(EINVAL)
        mfn = guest_frame(frames, domain, gfn)
        frames.get_ref(mfn)
        self.control[vcpu] = (mfn, offset)

    def add_page(self, frames: FrameTable, domain: Domain, gfn: int) -> None:
        """EVTCHNOP_expand_array: 1024 more event words."""
        if len(self.array) >= MAX_PAGES:
            raise XenError(ENOSPC)
        mfn = guest_frame(frames, domain, gfn)
        frames.get_ref(mfn)
        self.array.append(mfn)

    def drop(self, frames: FrameTable) -> None:
        """Back to the 2-level ABI: let go of all frames."""
        for mfn, _ in self.control.values():
            frames.put_ref(mfn)
        for mfn in self.array:
            frames.put_ref(mfn)
        self.control.clear()
        self.array.clear()

    @staticmethod
    def need(fifo: FifoState | None) -> FifoState:
        """EOPNOTSUPP for a domain that uses the 2-level ABI."""
        if fifo is None:
            raise XenError(EOPNOTSUPP)
        return fifo

    @staticmethod
    def check_priority(fifo: FifoState | None, priority: int) -> int:
        """ENOSYS for the 2-level ABI, EINVAL for a priority that cannot be."""
        if fifo is None:
            raise XenError(ENOSYS)
        if priority > EVTCHN_FIFO_PRIORITY_MIN:
            raise XenError(EINVAL)
        return priority
