"""A real NVMe process beside this one, which plays the hypervisor: `hypervisor.shell`'s peer and device shell, the core's IOMMU and DMA
service over memfd memory, and one domain's frames, identity mapped."""

from __future__ import annotations

import itertools
import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from bus import credentials
from bus.addresses import Bdf, DomId, Mfn
from bus.doorbell import Doorbell
from bus.messages.device import FROM_DEVICE, Access, AccessDone, Attach, DeviceHello, Dma, DmaDone, DmaRequest
from bus.messages.envelope import Message
from bus.messages.warden import Begin
from bus.packets import PacketLink, pair
from hypervisor.core.iommu import Iommu
from hypervisor.core.iommu_dma import DmaBatch, DmaItem, DmaResult, DmaService
from hypervisor.core.iommu_interrupts import InterruptEntry
from hypervisor.core.pool import XenPool
from hypervisor.shell.devices import DeviceShell, MemfdStaging, peer_id
from hypervisor.shell.memory import MemfdMemory
from hypervisor.shell.peers import Peer

ROOT = Path(__file__).resolve().parents[3]
BDF = Bdf(0x08)
DOMAIN = DomId(3)
FRAMES = 4096
BASE = 0x1000
"""First machine frame of the domain; its guest frame 0."""


class _Still:
    any_moving = False

    def moving(self, mfn: Mfn) -> bool:
        return False

    def when_still(self, now: int, mfns: set[Mfn], domain: DomId, run: Callable[[bool], None]) -> None:
        run(True)


class DeviceHost:
    """One device process. `memory` are the domain's frames, `page` and `bell` its doorbells."""

    def __init__(self, files: dict[str, int], settings: dict[str, object], *, doorbells: bool = True) -> None:
        """`files`: descriptors to deposit, by name (they stay the caller's)."""
        self.machine = MemfdMemory()
        self.machine.create_extent(Mfn(BASE), FRAMES)
        view, start = self.machine.place_of(BASE)
        self.memory = view[start : start + (FRAMES << 12)]
        self.iommu = Iommu(self.machine, XenPool(self.machine, Mfn(1 << 20), 4096))
        self.iommu.add_device(BDF)
        self.iommu.create_context(DOMAIN)
        for gfn in range(FRAMES):
            self.iommu.map_page(DOMAIN, gfn, Mfn(BASE + gfn), True)
        self.interrupts: list[int] = []
        self.dma = DmaService(self.iommu, _Still(), lambda mfn, count: None, self._interrupt)
        self.epoch = self.iommu.assign(BDF, DOMAIN)
        self.shell = DeviceShell(self.machine)
        self.doorbells = doorbells
        self._tokens = itertools.count(1)
        self._answers: dict[int, int] = {}
        self.hello: DeviceHello | None = None
        self.page: memoryview | None = None
        self._mapping: mmap.mmap | None = None
        self.bell: Doorbell | None = None
        self.batches = 0
        self._files, self._settings = files, settings
        self._directory = tempfile.TemporaryDirectory(prefix="domicile-device-")
        self.start()

    def start(self) -> None:
        """A process; it says hello, and is attached."""
        self.staging: MemfdStaging = self.shell.plug(BDF, "nvme", "disk")
        endpoint = f"{self._directory.name}/{next(self._tokens)}"
        server, client = credentials.make(f"ipc://{endpoint}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(endpoint)
        listener.listen()
        ours, theirs = pair()
        self.peer = Peer(peer_id(BDF), server, ours, FROM_DEVICE)
        self.peer.listen(listener)
        warden, begin = pair()
        command = [sys.executable, "-P", "-m", "domains.devices.nvme", "domicile-nvme", str(begin.fileno())]
        self.process = subprocess.Popen(
            command, pass_fds=[begin.fileno()], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        begin.close()
        keys = credentials.to_descriptor(client)
        names = ["keys", "descriptors", *self._files]
        fds = [keys, theirs.fileno(), *self._files.values()]
        self._warden = PacketLink(warden, {})
        self._warden.send(
            Begin(role="nvme", name="disk", domain=0, fds=names, settings=dict(self._settings)), fds
        )
        os.close(keys)
        theirs.close()
        self.hello = None
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        self.until(lambda: self.hello is not None)
        self.attach()

    def attach(self) -> None:
        """Tell it its epoch, with new doorbell pages. What the owner gets is kept here."""
        assert self.hello is not None
        host = self

        class _Owner:
            def order(self, number: int, what: str, body: dict[str, object], fds: list[int]) -> None:
                if fds:
                    host._forget_page()
                    host._mapping = mmap.mmap(fds[0], 4096)
                    host.page = memoryview(host._mapping)
                    host.bell = Doorbell(os.dup(fds[1]))

        message = Attach(bdf=BDF, epoch=self.epoch, staging=self.staging.size)
        self.shell.attach(message, self.hello, self.peer, _Owner(), self.doorbells)  # type: ignore[arg-type]  # what it uses
        if self.peer.lane is not None:
            self._epoll.register(self.peer.lane.fileno(), select.EPOLLIN)

    def _interrupt(self, now: int, entry: InterruptEntry) -> None:
        self.interrupts.append(entry.pirq)

    def until(self, done: Callable[[], bool], timeout: float = 20.0) -> None:
        """Serve the device until something is so."""
        deadline = time.monotonic() + timeout
        while not done():
            if self.process.poll() is not None:
                raise ConnectionError(f"the device process ended with {self.process.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError
            self.serve(0.5)

    def serve(self, timeout: float) -> None:
        """One round of what the hypervisor's server does."""
        for fd, _events in self._epoll.poll(timeout):
            assert self.peer.listener is not None
            if fd == self.peer.listener.fileno():
                new = self.peer.accept()
                if new is not None:
                    self._epoll.register(new, select.EPOLLIN)
                continue
            for message in self.peer.receive(fd):
                self._take(message)
            self.peer.flush()

    def _take(self, message: Message | DmaRequest) -> None:
        if isinstance(message, DeviceHello):
            self.hello = message
            self.peer.connected = True
        elif isinstance(message, AccessDone):
            self._answers[message.token] = message.value
        elif isinstance(message, Dma | DmaRequest):
            self.batches += 1
            token, by_lane = message.token, isinstance(message, DmaRequest)

            def done(result: DmaResult) -> None:
                reason = result.reason.name if result.reason is not None else ""
                if by_lane:
                    self.peer.answer_dma(token, result.fault)
                else:
                    self.peer.send(DmaDone(token=token, fault=result.fault, reason=reason))

            items = [DmaItem(*item) for item in message.items]
            batch = DmaBatch(BDF, message.epoch, items, list(message.vectors))
            self.dma.submit(time.monotonic_ns(), batch, self.staging, done)

    def access(self, space: int, offset: int, size: int, value: int | None = None) -> int:
        """A register access, waited for."""
        token = next(self._tokens)
        self.peer.send(
            Access(
                token=token,
                space=space,
                offset=offset,
                size=size,  # type: ignore[arg-type]  # 1, 2, 4 or 8
                write=value is not None,
                value=value or 0,
            )
        )
        self.until(lambda: token in self._answers)
        return self._answers.pop(token)

    def kill(self) -> None:
        """SIGKILL, and all links gone."""
        self.process.kill()
        self.process.wait()
        self.peer.close()
        self._warden.close()
        self._epoll.close()
        self.epoch = self.iommu.reset(BDF)

    def __enter__(self) -> DeviceHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._forget_page()
        self.shell.unplug(BDF)
        self.memory.release()
        self.machine.close()
        self._directory.cleanup()

    def _forget_page(self) -> None:
        if self.page is not None and self.bell is not None and self._mapping is not None:
            self.page.release()
            self._mapping.close()
            self.bell.close()
            self.page = self.bell = self._mapping = None
