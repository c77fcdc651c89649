"""The link between a device process ("hardware") and the hypervisor, and a domain's accesses to its devices.

Device to hypervisor: `DeviceHello`, `Dma`, `AccessDone`. Hypervisor to device: `Attach`, `Access`, `DmaDone`, `Refused`.
Which device it is comes from the link. See docs/decisions/0004-devices.md.
"""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from bus.messages.domain import FROM_DOMAIN, U16, U32, U64, Refused
from bus.messages.envelope import MAX_DESCRIPTORS, Message, registry

MAX_DMA_ITEMS = 1024
MAX_DMA_LENGTH = 1 << 20
"""Bytes of one DMA item."""
MAX_DMA_VECTORS = 64
Size = Literal[1, 2, 4, 8]
Space = Annotated[int, Field(ge=-1, le=5)]
"""-1: configuration space; 0 to 5: that base address register."""
DmaItem = Annotated[
    # (I/O virtual address, length in bytes, to memory?, offset in the staging memory)
    tuple[U64, Annotated[int, Field(ge=1, le=MAX_DMA_LENGTH)], bool, U32],
    Field(strict=False),
]


class Bar(Message):
    """A memory BAR: its size (a power of two), and the range of it that is doorbells (whole pages; 0 length: none)."""

    KIND: ClassVar[str] = "bar"
    index: Annotated[int, Field(ge=0, le=5)]
    size: Annotated[int, Field(ge=16, le=1 << 30)]
    doorbell_offset: U32 = 0
    doorbell_length: U32 = 0


class DeviceHello(Message):
    """First message of a device process."""

    KIND: ClassVar[str] = "device_hello"
    pid: U32
    bars: Annotated[list[Bar], Field(max_length=6)]
    vectors: Annotated[int, Field(ge=0, le=2048)]
    """MSI-X vectors that it has."""


class Dma(Message):
    """Carry out the items in order, then raise the vectors (MSI-X entry numbers); stop at the first fault."""

    KIND: ClassVar[str] = "dma"
    token: U64
    epoch: U64
    items: Annotated[list[DmaItem], Field(max_length=MAX_DMA_ITEMS)]
    vectors: Annotated[list[U16], Field(max_length=MAX_DMA_VECTORS)] = []


Item = tuple[int, int, bool, int]
"""(I/O virtual address, length in bytes, to memory?, offset in the staging memory)."""


class DmaRequest(NamedTuple):
    """The same, come by the DMA lane (`bus.dma_lane`): counts and lengths are within the limits of `Dma`."""

    token: int
    epoch: int
    items: list[Item]
    vectors: list[int]


class AccessDone(Message):
    """The value read (or 0)."""

    KIND: ClassVar[str] = "access_done"
    token: U64
    value: U64


class Attach(Message):
    """The device is told its address and epoch, and gets its descriptors (`bundle`, as in `Order`): staging memory, then for each
    doorbell range of its BARs a page memfd and a doorbell to listen to. Sent again at each new epoch, with new doorbell pages: that is
    a function-level reset, after which the device knows its media and nothing else."""

    KIND: ClassVar[str] = "attach"
    bdf: U32
    epoch: U64
    staging: U32
    """Bytes of staging memory."""
    descriptors: Annotated[int, Field(ge=0, le=MAX_DESCRIPTORS)] = 0
    bundle: U64 = 0
    lane: bool = False
    """The last descriptor is a DMA lane (`bus.dma_lane`): batches go that way in this epoch, and their answers come by it."""


class Access(Message):
    """A read or write of configuration space or a BAR; answer with `AccessDone`."""

    KIND: ClassVar[str] = "access"
    token: U64
    space: Space
    offset: U32
    size: Size
    write: bool
    value: U64 = 0


class DmaDone(Message):
    """The batch with that token is over. `fault` < 0: all done. Else the index of the item that faulted (0xFFFF: a vector was refused,
    0xFFFE: stale epoch), and the reason (VT-d fault reason code) with its words."""

    KIND: ClassVar[str] = "dma_done"
    token: U64
    fault: Annotated[int, Field(ge=-1, le=0xFFFF)]
    reason: Annotated[str, Field(max_length=200)] = ""


class DeviceAccess(Message):
    """A domain's access to a device of its own, by PCI address: answered by `HypercallReply` (rc 0, 8 bytes of value)."""

    KIND: ClassVar[str] = "device_access"
    token: U64
    bdf: U32
    space: Space
    offset: U32
    size: Size
    write: bool
    value: U64 = 0


class DeviceVector(Message):
    """The process of an HVM domain takes (`on`) or gives back an MSI-X vector of a device that its guest owns: it delivers the guest's
    message itself, and hears of the interrupt by the order `msi`. Answered by `HypercallReply`: -EPERM for another's device, -EINVAL
    for a vector that the device does not have, or in the process of another kind of domain (PHYSDEVOP_map_pirq is theirs)."""

    KIND: ClassVar[str] = "device_vector"
    token: U64
    bdf: U32
    entry: Annotated[int, Field(ge=0, le=2047)]
    on: bool


class Plug(Message):
    """The control domain plugs a device in (its process is started by the warden, with the descriptors that were deposited there
    under `name`), or pulls it out. Answered by `HypercallReply`. A device that is plugged in again keeps its owner."""

    KIND: ClassVar[str] = "plug"
    token: U64
    bdf: U32
    role: Annotated[str, Field(max_length=32, pattern=r"^[a-z0-9]+$")]
    name: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.:-]+$")]
    present: bool = True


class Inspect(Message):
    """The control domain asks what the hypervisor's hardware side looks like, for show: answered by `HypercallReply` with msgpack
    data. `what` "iommu": `args` has `bdf` or `domain` (or neither: all), and `iova` for a walk. "trace": somebody watches (`args` has
    `on`), or nobody does any more; no data."""

    KIND: ClassVar[str] = "inspect"
    token: U64
    what: Literal["iommu", "trace"]
    args: Annotated[dict[str, Any], Field(max_length=8)] = {}


FROM_DEVICE = registry(DeviceHello, Dma, AccessDone)
TO_DEVICE = registry(Attach, Access, DmaDone, Refused)
FROM_ANY_DOMAIN = {**FROM_DOMAIN, **registry(DeviceAccess, DeviceVector, Plug, Inspect)}
"""All that may come from a domain's process."""
