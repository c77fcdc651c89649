"""The DMA lane: a packet socket between a device's process and the hypervisor, beside the link, for what is asked most often.

A device's link is ZeroMQ with encryption: each message costs two more wake-ups (libzmq's thread, both ways) and as much time again as all
that is in it. Where both processes are on one host, `Attach` brings a lane: one end of a SOCK_SEQPACKET pair, made anew for each epoch, so
that who is at its other end needs no proof. It carries DMA batches (as `bus.messages.device.Dma`) and their answers (`DmaDone`), in fixed
layouts, little-endian:

* to the hypervisor, a packet a batch: u64 token, u64 epoch, u16 count of items, u16 count of vectors, 4 bytes 0; then for each item u64 I/O
  virtual address, u32 length (bit 31: to memory), u32 position in the staging memory; then a u16 MSI-X entry for each vector.
* to the device, packets of answers: u64 token, i32 fault (as `DmaDone.fault`).

Packets are the kernel's copies: nothing in them changes after it was checked. Neither side ever waits for the other here but the device, which
has nothing else to do. What a device sends on its link after a batch is obeyed after it.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Final

from bus.messages.device import MAX_DMA_ITEMS, MAX_DMA_LENGTH, MAX_DMA_VECTORS, DmaRequest, Item
from bus.messages.envelope import BadMessage

MAX_PACKETS: Final = 512
"""Taken from a lane at once: more than the kernel keeps of one sender's."""
TO_MEMORY: Final = 1 << 31
_HEAD: Final = struct.Struct("<QQHHI")
_ITEM: Final = struct.Struct("<QII")
_ANSWER: Final = struct.Struct("<Qi")
_MAX_REQUEST: Final = _HEAD.size + MAX_DMA_ITEMS * _ITEM.size + 2 * MAX_DMA_VECTORS
_MAX_ANSWERS: Final = 512
_NOW: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class LaneClosed(ConnectionError):
    """Nobody is at the other end any more, or it does not take what it asked for."""


def pack(token: int, epoch: int, items: Sequence[Item], vectors: Sequence[int]) -> bytes:
    """A batch as it is sent. struct.error for what does not fit."""
    put = _ITEM.pack
    parts = [_HEAD.pack(token, epoch, len(items), len(vectors), 0)]
    parts += [put(iova, length | TO_MEMORY if write else length, at) for iova, length, write, at in items]
    if vectors:
        parts.append(struct.pack(f"<{len(vectors)}H", *vectors))
    return b"".join(parts)


def unpack(raw: bytes) -> DmaRequest:
    """A batch as it came, from whoever. BadMessage."""
    if not _HEAD.size <= len(raw) <= _MAX_REQUEST:
        raise BadMessage(f"DMA lane: a packet of {len(raw)} bytes")
    token, epoch, count, vectors, zero = _HEAD.unpack_from(raw)
    end = _HEAD.size + count * _ITEM.size
    if count > MAX_DMA_ITEMS or vectors > MAX_DMA_VECTORS or zero or len(raw) != end + 2 * vectors:
        raise BadMessage(f"DMA lane: {count} items and {vectors} vectors in {len(raw)} bytes")
    items: list[Item] = []
    for iova, length, at in _ITEM.iter_unpack(raw[_HEAD.size : end]):
        size = length & ~TO_MEMORY
        if not 1 <= size <= MAX_DMA_LENGTH:
            raise BadMessage(f"DMA lane: an item of {size} bytes")
        items.append((iova, size, length != size, at))
    return DmaRequest(token, epoch, items, list(struct.unpack_from(f"<{vectors}H", raw, end)))


class _End:
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """For poll and select."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _packets(self, size: int) -> Iterator[bytes]:
        """What waits. LaneClosed."""
        for _ in range(MAX_PACKETS):
            try:
                raw = self._socket.recv(size + 1, _NOW)
            except BlockingIOError:
                return
            except OSError as error:
                raise LaneClosed(f"DMA lane: {error.strerror}") from None
            if not raw:
                raise LaneClosed("DMA lane: closed")
            yield raw


class HypervisorEnd(_End):
    """Takes batches, gives answers; never waits."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._answers: list[bytes] = []

    @classmethod
    def pair(cls) -> tuple[HypervisorEnd, socket.socket]:
        """Our end, and the one to hand over (descriptors that come with a packet are never received)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    def receive(self) -> Iterator[DmaRequest | BadMessage]:
        """What waits, in order; in place of a packet that makes no sense, what is wrong with it. LaneClosed."""
        for raw in self._packets(_MAX_REQUEST):
            try:
                yield unpack(raw)
            except BadMessage as error:
                yield error

    def answer(self, token: int, fault: int) -> None:
        """Keep an answer for `flush`."""
        self._answers.append(_ANSWER.pack(token, fault))

    def flush(self) -> None:
        """Send the answers. LaneClosed, also for a device that does not read them."""
        while self._answers:
            batch, self._answers = self._answers[:_MAX_ANSWERS], self._answers[_MAX_ANSWERS:]
            try:
                self._socket.send(b"".join(batch), _NOW)
            except OSError as error:  # full, or closed
                raise LaneClosed(f"DMA lane: {error.strerror}") from None


class DeviceEnd(_End):
    """Sends batches, takes answers."""

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor. OSError if it is no socket."""
        super().__init__(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd))

    def send(self, raw: bytes, timeout: float) -> None:
        """Send a batch (of `pack`), waiting so many seconds at the most for room. LaneClosed."""
        until = time.monotonic() + timeout
        while True:
            try:
                self._socket.send(raw, _NOW)
                return
            except BlockingIOError:
                left = until - time.monotonic()
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                if left <= 0 or not poll.poll(left * 1000):
                    raise LaneClosed("DMA lane: full") from None
            except OSError as error:
                raise LaneClosed(f"DMA lane: {error.strerror}") from None

    def receive(self) -> Iterator[tuple[int, int]]:
        """(token, fault) of the answers that wait. LaneClosed."""
        for raw in self._packets(_MAX_ANSWERS * _ANSWER.size):
            yield from _ANSWER.iter_unpack(raw[: len(raw) - len(raw) % _ANSWER.size])
