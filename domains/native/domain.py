"""`NativeDomain`: hypercalls, event channels, grants and memory for a domain that is a Python program.

Its memory is auto-translated: it knows guest frame numbers, and its process has the host mapping of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from bus import trace_page
from bus.abi import event_channel as ec
from bus.abi import grant_table as gt
from bus.abi import physdev, xen
from bus.abi.errno import XEN_ENOSYS
from bus.abi.hvm import hvm_op
from bus.addresses import PAGE_SIZE, DomId, GrantRef, Mfn, Port
from bus.credentials import from_descriptor
from bus.doorbell import Doorbell
from bus.link import DomainLink
from bus.messages.device import DeviceAccess
from bus.messages.domain import Hello, Order, Raised
from bus.messages.envelope import Message
from bus.packets import close_all
from bus.process import Start
from domains.device_bell import DeviceBell
from domains.granting import Granting
from domains.hostmem import HostMemory, Window
from domains.native.reactor import Reactor

MAX_GRANT_BATCH: Final = 128
P2M_RAM: Final = 1
"""Type of a `memory` order's p2m run: the domain's own RAM (hypervisor.core.p2m.P2mType.RAM)."""


class HypercallError(OSError):
    """A hypercall was refused: `errno` is Xen's."""

    def __init__(self, errno: int, what: str) -> None:
        super().__init__(errno, f"{what}: {os.strerror(errno)}")


class GrantError(Exception):
    """A grant operation was refused: `status` is a GNTST_*."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(f"{what}: grant status {status}")
        self.status = status


@dataclass(slots=True)
class GrantMapping:
    """Granted frames, mapped here; `pages[i]` are the 4096 bytes of the i-th."""

    domain: DomId
    handles: list[int]
    pages: list[memoryview]
    gfns: list[int]


@dataclass(slots=True)
class _Channel:
    port: Port
    callback: Callable[[], None]
    ring: Doorbell | None = None
    listen: Doorbell | None = None


class NativeDomain:
    """One per process, on one thread."""

    def __init__(self, start: Start, reactor: Reactor) -> None:
        """Connects and says hello; `configure` and `extent` orders follow on the link."""
        import socket

        self.reactor = reactor
        self.link = DomainLink(
            from_descriptor(start.fds["keys"]), socket.socket(fileno=start.fds["descriptors"])
        )
        self.link.on_message = self._message
        self.trace, self.counters = trace_page.of_process(start.fds)
        self.link.trace = self.trace
        self.domid = DomId(start.domain)
        self.memory: HostMemory | None = None
        self.ram_frames = 0
        self.shared_info = Mfn(0)
        self._p2m: dict[int, int] = {}
        self._device_bells: dict[int, list[DeviceBell]] = {}
        self.devices: set[int] = set()
        """PCI addresses of its own devices."""
        self.on_device: Callable[[int], None] | None = None
        self.known_channels: list[tuple[int, ...]] = []
        """(port, EVTCHNSTAT_*, vCPU, remote domain, remote port, VIRQ or PIRQ, priority): what a process that takes the place of
        another finds."""
        self._windows: dict[int, tuple[Window, int]] = {}
        self._superseded: dict[int, list[Window]] = {}
        """Read-only mappings of windows that were mapped writable later; views of them are in use."""
        self._attached: dict[int, tuple[int, memoryview]] = {}
        self._channels: dict[Port, _Channel] = {}
        self._early_raises: set[Port] = set()
        self._granting: Granting | None = None
        self._next_foreign = 1 << 20
        self._dma_next = 1 << 21
        self._dma_free: list[int] = []
        self.foreign_extents: dict[DomId, tuple[int, dict[str, Any]]] = {}
        """Memfds of domains that this one builds: domid -> (descriptor, body of the order)."""
        self.on_order: dict[str, Callable[[Order, list[int]], bytes]] = {
            "configure": lambda order, fds: b"",
            "extent": self._extent,
            "build_extent": self._build_extent,
            "drop_extent": self._drop_extent,
            "memory": self._memory_news,
            "own_windows": self._own_windows,
            "channels": self._known_channels,
            "loop": lambda order, fds: b"",
            "start": lambda order, fds: b"",
            "wallclock": lambda order, fds: b"",  # it has the host's
            "time_offset": lambda order, fds: b"",
            "pause": lambda order, fds: b"",
            "resume": lambda order, fds: b"",
            "stop": self._stop,
            "grant_map": self._grant_map,
            "grant_unmap": self._grant_unmap,
            "grant_attach": self._grant_attach,
            "grant_detach": self._grant_detach,
            "doorbell": self._doorbell,
            "doorbell_off": self._doorbell_off,
            "device_attached": self._device_attached,
        }
        reactor.reader(self.link.fileno(), lambda: None)
        reactor.before_wait.append(self.poll)
        self.link.send(Hello(pid=os.getpid(), role=start.role))

    def poll(self) -> bool:
        """Take what came on the link; True if there was something."""
        return bool(self.link.dispatch())

    # ------------------------------------------------------------------ hypercalls

    def hypercall(self, nr: int, cmd: int, data: bytes = b"") -> tuple[int, bytes]:
        """The raw call: (return value, updated structures)."""
        return self.link.call(nr, cmd, data)

    def call(self, nr: int, cmd: int, data: bytes = b"", what: str = "") -> bytes:
        """The same, but HypercallError for a negative return value."""
        rc, reply = self.hypercall(nr, cmd, data)
        if rc < 0:
            raise HypercallError(-rc, what or f"hypercall {nr}.{cmd}")
        return reply

    def hvm_param(self, index: int) -> int:
        """HVMOP_get_param of its own: where its xenstore page and port are, for one."""
        reply = self.call(
            xen.HYPERVISOR_hvm_op,
            hvm_op.HVMOP_get_param,
            hvm_op.XEN_HVM_PARAM.pack(
                hvm_op.xen_hvm_param(domid=xen.DOMID_SELF, pad=0, index_=index, value=0)
            ),
            f"HVM parameter {index}",
        )
        return hvm_op.XEN_HVM_PARAM.unpack(reply).value

    # ------------------------------------------------------------------ devices of its own

    def device_read(self, bdf: int, space: int, offset: int, size: int) -> int:
        """A register of a device: `space` -1 is configuration space, else a BAR. All ones where nothing answers."""
        return self._device_access(bdf, space, offset, size, None)

    def device_write(self, bdf: int, space: int, offset: int, size: int, value: int) -> None:
        """Write a register; returns when the device has it. Doorbells of the device are rung without a message."""
        if space >= 0:
            for bell in self._device_bells.get(bdf, ()):
                if bell.holds(space, offset, size):
                    bell.store(offset, size, value)
                    return
        self._device_access(bdf, space, offset, size, value)

    def ring_doorbells(
        self, bdf: int, bar: int, values: Sequence[tuple[int, int]], *, wake: bool = True
    ) -> None:
        """Store 32-bit registers of a doorbell range, each (offset, value), and ring once, if `wake`. By messages where there is no
        such range."""
        for bell in self._device_bells.get(bdf, ()):
            if all(bell.holds(bar, offset, 4) for offset, _ in values):
                for offset, value in values:
                    bell.put(offset, 4, value)
                if wake:
                    bell.ring()
                return
        for offset, value in values:
            self._device_access(bdf, bar, offset, 4, value)

    def _device_access(self, bdf: int, space: int, offset: int, size: int, value: int | None) -> int:
        token = self.link.next_token()
        message = DeviceAccess(
            token=token,
            bdf=bdf,
            space=space,
            offset=offset,
            size=size,  # type: ignore[arg-type]  # validated by the model
            write=value is not None,
            value=value or 0,
        )
        rc, data = self.link.exchange(message, token)
        if rc < 0:
            raise HypercallError(-rc, f"register of device {bdf:#x}")
        return int.from_bytes(data, "little")

    def _device_attached(self, order: Order, fds: list[int]) -> bytes:
        """A device of its own came, or was reset: its doorbell pages."""
        bdf = order.body["bdf"]
        for bell in self._device_bells.pop(bdf, ()):
            bell.close()
        ranges = order.body["doorbells"]
        self._device_bells[bdf] = [
            DeviceBell(fds[2 * index], fds[2 * index + 1], each["bar"], each["offset"], each["length"])
            for index, each in enumerate(ranges)
        ]
        self.devices.add(bdf)
        if self.on_device is not None:
            self.reactor.soon(partial(self.on_device, bdf))
        return b""

    def bind_msi(self, bdf: int, entry: int, callback: Callable[[], None]) -> Port:
        """A port for an MSI-X vector of a device: PHYSDEVOP_map_pirq and EVTCHNOP_bind_pirq."""
        layout = physdev.PHYSDEV_MAP_PIRQ
        request = layout.zero()._replace(
            domid=xen.DOMID_SELF,
            type=physdev.MAP_PIRQ_TYPE_MSI_SEG,
            index_=-1,
            pirq=-1,
            bus=(bdf >> 16) << 16 | (bdf >> 8 & 0xFF),
            devfn=bdf & 0xFF,
            entry_nr=entry,
        )
        reply = self.call(
            xen.HYPERVISOR_physdev_op, physdev.PHYSDEVOP_map_pirq, layout.pack(request), "PHYSDEVOP_map_pirq"
        )
        pirq = layout.unpack(reply).pirq
        reply = self.call(
            xen.HYPERVISOR_event_channel_op,
            ec.EVTCHNOP_bind_pirq,
            ec.EVTCHN_BIND_PIRQ.pack(ec.evtchn_bind_pirq(pirq=pirq, flags=0, port=0)),
            "EVTCHNOP_bind_pirq",
        )
        port = Port(ec.EVTCHN_BIND_PIRQ.unpack(reply).port)
        self.on_event(port, callback)
        return port

    # ------------------------------------------------------------------ orders and events

    def _message(self, message: Message) -> None:
        if isinstance(message, Raised):
            for port, _vcpu in message.events:
                self._raise(Port(port))
        elif isinstance(message, Order):
            fds = self.link.descriptors_of(message)
            handler = self.on_order.get(message.what)
            if handler is None:
                close_all(fds)
                self.link.answer(message, -XEN_ENOSYS)
                return
            try:
                data = handler(message, fds)
            except (KeyError, TypeError, ValueError) as error:
                raise RuntimeError(f"order {message.what}: {error!r}") from error
            self.link.answer(message, 0, data)

    def _extent(self, order: Order, fds: list[int]) -> bytes:
        body = order.body
        self.memory = HostMemory(fds[0], Mfn(body["base"]), body["frames"])
        self.ram_frames = body["ram_frames"]
        self.shared_info = Mfn(body["shared_info"])
        self._granting = Granting(self.memory)
        return b""

    def _memory_news(self, order: Order, fds: list[int]) -> bytes:
        """The physical map: where the guest frames are in machine memory."""
        for gfn, mfn, count, kind in order.body.get("p2m", ()):
            for offset in range(count):
                if kind == P2M_RAM:
                    self._p2m[gfn + offset] = mfn + offset
                else:
                    self._p2m.pop(gfn + offset, None)
        return b""

    def _own_windows(self, order: Order, fds: list[int]) -> bytes:
        """A new process finds frames that its domain granted in windows."""
        assert self.memory is not None
        by_number = dict(zip(order.body["windows"], fds, strict=True))
        for mfn, number, index in order.body["frames"]:
            self.memory.find_in_window(Mfn(mfn), by_number[number], index)
        close_all(fds)
        return b""

    def _known_channels(self, order: Order, fds: list[int]) -> bytes:
        """A new process is told which event channels its domain has."""
        self.known_channels += [tuple(row) for row in order.body["channels"]]
        return b""

    # ------------------------------------------------------------------ own memory

    def page(self, gfn: int) -> memoryview:
        """The 4096 bytes of a frame of its own. KeyError if there is none at that guest frame number."""
        assert self.memory is not None
        return self.memory.page(Mfn(self._p2m[gfn]))

    def pages(self, gfn: int, count: int) -> memoryview:
        """Several frames of its own in a row. MemoryError if they are not in a row in machine memory."""
        assert self.memory is not None
        first = self._p2m[gfn]
        if [*map(self._p2m.get, range(gfn, gfn + count))] != [*range(first, first + count)]:
            raise MemoryError(f"guest frames {gfn:#x}+{count} are not in a row")
        start = (first - self.memory.base) * PAGE_SIZE
        return self.memory.octets[start : start + count * PAGE_SIZE]

    def take_dma_gfn(self) -> int:
        """A guest frame number at which a granted frame can be entered in the I/O page tables."""
        if self._dma_free:
            return self._dma_free.pop()
        self._dma_next += 1
        return self._dma_next - 1

    def give_dma_gfn(self, gfn: int) -> None:
        """It is free again."""
        self._dma_free.append(gfn)

    @property
    def own_gfns(self) -> list[int]:
        """Guest frame numbers of its own memory, in order."""
        return sorted(self._p2m)

    def _build_extent(self, order: Order, fds: list[int]) -> bytes:
        old = self.foreign_extents.pop(DomId(order.body["domid"]), None)
        if old is not None:
            os.close(old[0])
        self.foreign_extents[DomId(order.body["domid"])] = (fds[0], order.body)
        return b""

    def _drop_extent(self, order: Order, fds: list[int]) -> bytes:
        old = self.foreign_extents.pop(DomId(order.body["domid"]), None)
        if old is not None:
            os.close(old[0])
        return b""

    def _stop(self, order: Order, fds: list[int]) -> bytes:
        self.reactor.stopping = True
        return b""

    # ------------------------------------------------------------------ event channels

    def _raise(self, port: Port) -> None:
        channel = self._channels.get(port)
        if channel is not None:
            self.reactor.soon(channel.callback)
        else:
            self._early_raises.add(port)

    def on_event(self, port: Port, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever the port is raised; at once if it was already."""
        channel = self._channels.get(port)
        if channel is None:
            self._channels[port] = _Channel(port, callback)
        else:
            channel.callback = callback
        if port in self._early_raises:
            self._early_raises.discard(port)
            self.reactor.soon(callback)

    def _doorbell(self, order: Order, fds: list[int]) -> bytes:
        port = Port(order.body["port"])

        def early() -> None:
            self._early_raises.add(port)

        channel = self._channels.setdefault(port, _Channel(port, early))
        self._silence(channel)
        channel.ring = Doorbell(fds[0]) if len(fds) > 1 else None  # an interrupt is only listened to
        channel.listen = Doorbell(fds[-1])
        self.reactor.reader(channel.listen.fd, lambda: self._rung(channel))
        return b""

    def _rung(self, channel: _Channel) -> None:
        if channel.listen is not None and channel.listen.take():
            channel.callback()

    def _silence(self, channel: _Channel) -> None:
        if channel.listen is not None:
            self.reactor.forget(channel.listen.fd)
            channel.listen.close()
        if channel.ring is not None:
            channel.ring.close()
        channel.ring = channel.listen = None

    def _doorbell_off(self, order: Order, fds: list[int]) -> bytes:
        channel = self._channels.get(Port(order.body["port"]))
        if channel is not None:
            self._silence(channel)
        return b""

    def alloc_unbound(self, dom: int, remote: int) -> Port:
        """A port of `dom` (DOMID_SELF, or a domain that this one controls) to which `remote` may bind."""
        reply = self.call(
            xen.HYPERVISOR_event_channel_op,
            ec.EVTCHNOP_alloc_unbound,
            ec.EVTCHN_ALLOC_UNBOUND.pack(ec.evtchn_alloc_unbound(dom=dom, remote_dom=remote, port=0)),
            "EVTCHNOP_alloc_unbound",
        )
        return Port(ec.EVTCHN_ALLOC_UNBOUND.unpack(reply).port)

    def bind_interdomain(self, remote: DomId, remote_port: Port, callback: Callable[[], None]) -> Port:
        """A local port joined to another domain's."""
        reply = self.call(
            xen.HYPERVISOR_event_channel_op,
            ec.EVTCHNOP_bind_interdomain,
            ec.EVTCHN_BIND_INTERDOMAIN.pack(
                ec.evtchn_bind_interdomain(remote_dom=remote, remote_port=remote_port, local_port=0)
            ),
            "EVTCHNOP_bind_interdomain",
        )
        port = Port(ec.EVTCHN_BIND_INTERDOMAIN.unpack(reply).local_port)
        self.on_event(port, callback)
        return port

    def bind_virq(self, virq: int, callback: Callable[[], None]) -> Port:
        """A port for a virtual interrupt, on vCPU 0."""
        reply = self.call(
            xen.HYPERVISOR_event_channel_op,
            ec.EVTCHNOP_bind_virq,
            ec.EVTCHN_BIND_VIRQ.pack(ec.evtchn_bind_virq(virq=virq, vcpu=0, port=0)),
            "EVTCHNOP_bind_virq",
        )
        port = Port(ec.EVTCHN_BIND_VIRQ.unpack(reply).port)
        self.on_event(port, callback)
        return port

    def notify(self, port: Port) -> None:
        """EVTCHNOP_send: by doorbell where there is one."""
        channel = self._channels.get(port)
        if channel is not None and channel.ring is not None:
            channel.ring.ring()
            return
        self.hypercall(
            xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_send, ec.EVTCHN_SEND.pack(ec.evtchn_send(port=port))
        )

    def close_port(self, port: Port) -> None:
        """EVTCHNOP_close. A port that is closed already is no error."""
        channel = self._channels.pop(port, None)
        if channel is not None:
            self._silence(channel)
        self.hypercall(
            xen.HYPERVISOR_event_channel_op,
            ec.EVTCHNOP_close,
            ec.EVTCHN_CLOSE.pack(ec.evtchn_close(port=port)),
        )

    # ------------------------------------------------------------------ grants of others

    def map_grants(self, domain: DomId, refs: Sequence[GrantRef], *, writable: bool = True) -> GrantMapping:
        """Map another domain's granted frames. GrantError (nothing is mapped then) if one of them is refused."""
        mapping = GrantMapping(domain, [], [], [])
        flags = gt.GNTMAP_host_map | (0 if writable else gt.GNTMAP_readonly)
        failed: int | None = None
        for start in range(0, len(refs), MAX_GRANT_BATCH):
            batch = refs[start : start + MAX_GRANT_BATCH]
            request = b""
            gfns = range(self._next_foreign, self._next_foreign + len(batch))
            self._next_foreign += len(batch)
            for ref, gfn in zip(batch, gfns, strict=True):
                request += gt.GNTTAB_MAP_GRANT_REF.pack(
                    gt.gnttab_map_grant_ref(gfn << 12, flags, ref, domain, 0, 0, 0)
                )
            reply = self.call(
                xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, request, "map_grant_ref"
            )
            size = gt.GNTTAB_MAP_GRANT_REF.size
            for index, gfn in enumerate(gfns):
                answer = gt.GNTTAB_MAP_GRANT_REF.unpack(reply, index * size)
                if answer.status != gt.GNTST_okay:
                    failed = answer.status if failed is None else failed
                    continue
                mapping.handles.append(answer.handle)
                mapping.gfns.append(gfn)
                mapping.pages.append(self._attached[answer.handle][1])
        if failed is not None:
            self.unmap_grants(mapping)
            raise GrantError(failed, f"map of {len(refs)} frames of domain {domain}")
        return mapping

    def unmap_grants(self, mapping: GrantMapping) -> None:
        """Undo `map_grants`. Its pages must not be used any more."""
        for start in range(0, len(mapping.handles), MAX_GRANT_BATCH):
            request = b""
            for handle, gfn in list(zip(mapping.handles, mapping.gfns, strict=True))[
                start : start + MAX_GRANT_BATCH
            ]:
                request += gt.GNTTAB_UNMAP_GRANT_REF.pack(gt.gnttab_unmap_grant_ref(gfn << 12, 0, handle, 0))
            self.call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_unmap_grant_ref, request, "unmap_grant_ref")
        mapping.handles, mapping.pages, mapping.gfns = [], [], []

    def _grant_attach(self, order: Order, fds: list[int]) -> bytes:
        writable: dict[int, bool] = {}
        frames: dict[int, int] = {}
        items = order.body["items"]
        for _handle, _mfn, number, _index, is_writable, *_ in items:
            writable[number] = writable.get(number, False) or is_writable
        fresh = dict(zip(order.body.get("windows", ()), fds, strict=True))
        for number, fd in fresh.items():
            known = self._windows.get(number)
            if known is not None and (known[0].writable or not writable.get(number, False)):
                os.close(fd)
                continue
            frames[number] = os.fstat(fd).st_size // PAGE_SIZE
            window = Window(fd, frames[number], writable.get(number, False))
            if known is not None:
                self._superseded.setdefault(number, []).append(known[0])
            self._windows[number] = (window, known[1] if known is not None else 0)
        for handle, mfn, number, index, *_ in items:
            if number in self._windows:
                window, users = self._windows[number]
                self._windows[number] = (window, users + 1)
                self._attached[handle] = (number, window.page(index))
            else:  # its own frame
                assert self.memory is not None
                self._attached[handle] = (-1, self.memory.page(Mfn(mfn)))
        return bytes(2 * len(items))

    def _grant_detach(self, order: Order, fds: list[int]) -> bytes:
        items = order.body["items"]
        for handle, *_ in items:
            number, _page = self._attached.pop(handle, (-1, memoryview(b"")))
            if number in self._windows:
                window, users = self._windows[number]
                if users <= 1:
                    for old in [window, *self._superseded.pop(number, [])]:
                        old.close()
                    del self._windows[number]
                else:
                    self._windows[number] = (window, users - 1)
        return bytes(2 * len(items))

    # ------------------------------------------------------------------ own grants

    def _grant_map(self, order: Order, fds: list[int]) -> bytes:
        assert self._granting is not None
        return self._granting.grant_map(order.body, fds)

    def _grant_unmap(self, order: Order, fds: list[int]) -> bytes:
        assert self._granting is not None
        return self._granting.grant_unmap(order.body)
