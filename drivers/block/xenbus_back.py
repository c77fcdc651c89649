"""The back end's side of a virtual disk's way up and down (nodes as in blkif.h); no hotplug script is waited for: who provides the port
has opened the disk."""

from __future__ import annotations

from typing import Final, Protocol

from drivers.block.nodes import FrontLink, QueueLink
from drivers.block.requests import Disk
from drivers.block.wire import ABIS, X86_64
from drivers.xenbus.back import BackEnd, Port
from drivers.xenbus.client import Procedure, transaction
from drivers.xenbus.nodes import NodeError, read_nodes, write_all
from drivers.xenbus.paged_ring import MAX_ORDER

MAX_REF: Final = 0xFFFFFFFF


class BackPort(Port, Protocol):
    """What the shell does when told."""

    def connect(self, link: FrontLink, disk: Disk) -> None:
        """Map the rings, bind the channels, serve. ConnectError if that cannot be done (nothing is held then)."""


class BackDevice(BackEnd):
    """One virtual disk at the back end."""

    def __init__(
        self,
        path: str,
        frontend: str,
        disk: Disk,
        port: BackPort,
        *,
        max_queues: int = 4,
        max_order: int = MAX_ORDER,
        persistent: bool = True,
        block_size: int = 512,
    ) -> None:
        """`path`, `frontend`: the two ends' directories. `disk`: as for 512-byte sectors. `block_size`: the storage's:
        with 4096 only frontends that set feature-large-sector-size can be served."""
        if not 1 <= max_queues <= 16 or not 0 <= max_order <= MAX_ORDER:
            raise ValueError(f"{max_queues} queues, order {max_order}")
        super().__init__(path, frontend, port)
        self.disk: Final = disk
        self._rings: Final = port
        self._max_queues: Final = max_queues
        self._max_order: Final = max_order
        self._persistent: Final = persistent
        self._block_size: Final = block_size

    def _features(self) -> list[tuple[str, str]]:
        disk = self.disk
        nodes = [
            ("feature-flush-cache", str(int(disk.flush))),
            ("feature-barrier", str(int(disk.barrier))),
            ("feature-persistent", str(int(self._persistent))),
            ("max-ring-page-order", str(self._max_order)),
            ("max-ring-pages", str(1 << self._max_order)),
            ("multi-queue-max-queues", str(self._max_queues)),
            ("feature-discard", str(int(disk.discard))),
        ]
        if disk.max_indirect:
            nodes.append(("feature-max-indirect-segments", str(disk.max_indirect)))
        if disk.discard:
            nodes.append(("discard-granularity", str(disk.discard_granularity)))
            nodes.append(("discard-alignment", "0"))
            nodes.append(("discard-secure", str(int(disk.discard_secure))))
        return nodes

    def _connect(self) -> Procedure[None]:
        link = yield from self.read_link()
        size = self._block_size
        if size > 512 and not link.large_sectors:
            raise NodeError(
                f"the disk has sectors of {size} bytes, and the frontend lacks feature-large-sector-size"
            )
        disk = Disk(
            self.disk.sectors,
            size,
            max(size, self.disk.physical_sector_size),
            self.disk.read_only,
            self.disk.removable,
            self.disk.cdrom,
            self.disk.flush,
            self.disk.barrier,
            self.disk.discard,
            self.disk.discard_granularity,
            self.disk.discard_secure,
            self.disk.max_indirect,
        )
        nodes = [
            ("sectors", str(disk.sectors * 512 // size)),
            ("info", str(disk.info)),
            ("sector-size", str(size)),
            ("physical-sector-size", str(disk.physical_sector_size)),
        ]
        yield from transaction(lambda tx: write_all(self.path, nodes, tx))
        self._rings.connect(link, disk)

    def read_link(self) -> Procedure[FrontLink]:
        """What the frontend published. NodeError if it makes no sense."""
        base = self.frontend
        nodes = yield from read_nodes(
            base,
            (
                *("protocol", "ring-page-order", "num-ring-pages", "multi-queue-num-queues"),
                *("feature-persistent", "feature-large-sector-size"),
            ),
        )
        protocol = nodes["protocol"]
        abi = ABIS.get(protocol.decode("ascii", "replace")) if protocol else X86_64
        if abi is None:
            raise NodeError(f"protocol is {protocol[:32] if protocol else b''!r}: unknown")
        if nodes["ring-page-order"] is None:
            pages = nodes.number("num-ring-pages", 1, 1, 1 << self._max_order)
            if pages & (pages - 1):
                raise NodeError(f"num-ring-pages is {pages}: not a power of two")
        else:
            pages = 1 << nodes.number("ring-page-order", 0, 0, self._max_order)
        queues = nodes.number("multi-queue-num-queues", 1, 1, self._max_queues)
        persistent = nodes.number("feature-persistent", 0, 0, 1)
        large = nodes.number("feature-large-sector-size", 0, 0, 1)
        links: list[QueueLink] = []
        for queue in range(queues):
            place = base if queues == 1 else f"{base}/queue-{queue}"
            names = [f"ring-ref{page}" for page in range(pages)]
            nodes = yield from read_nodes(place, ("event-channel", "ring-ref", *names))
            channel = nodes.number("event-channel", None, 1, MAX_REF)
            if pages == 1 and nodes["ring-ref"] is not None:
                names = ["ring-ref"]
            links.append(QueueLink(tuple(nodes.number(name, None, 0, MAX_REF) for name in names), channel))
        every = [ref for link in links for ref in link.ring_refs]
        if len(set(every)) < len(every):
            raise NodeError("two ring pages have the same grant")
        return FrontLink(tuple(links), abi, self._persistent and bool(persistent), bool(large))
