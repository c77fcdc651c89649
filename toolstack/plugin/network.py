"""A test on a machine's network: a port of a bridge from which it sends Ethernet frames to guests, and expects theirs.

Frames are bytes here; where scapy is installed (`pip install domicile[network]`) packets of scapy can be sent, and are what comes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from toolstack.errors import InputError, MachineError

if TYPE_CHECKING:
    from toolstack.plugin.guests import GuestMachine

BRIDGE: Final = "xenbr0"
TIMEOUT_S: Final = 10.0
MAX_FRAME: Final = 65535
MIN_FRAME: Final = 14
MAX_CAPTURE: Final = 32 << 20
"""Bytes of a capture; the oldest frames go first."""
MAX_WAITING: Final = 10_000
SHOWN: Final = 12
"""Frames in a failure."""
SLICE_S: Final = 0.5
_FILE: Final = struct.Struct("<IHHiIII")
_RECORD: Final = struct.Struct("<IIII")
Filter = Callable[[Any], Any]


class NetworkFailure(AssertionError):
    """What was expected did not come. The text has what came instead."""


class Capture:
    """Frames as they were seen, with the time."""

    def __init__(self) -> None:
        self.frames: deque[tuple[float, bytes]] = deque()
        """(seconds since 1970, frame)"""
        self._size = 0

    def add(self, data: bytes) -> None:
        """A frame was seen now."""
        self.frames.append((time.time(), data))
        self._size += len(data) + 64
        while self._size > MAX_CAPTURE:
            self._size -= len(self.frames.popleft()[1]) + 64

    def pcap(self) -> bytes:
        """The capture as a pcap file (version 2.4, Ethernet)."""
        parts = [_FILE.pack(0xA1B2C3D4, 2, 4, 0, 0, MAX_FRAME, 1)]
        for when, data in self.frames:
            seconds = int(when)
            parts.append(_RECORD.pack(seconds, int((when - seconds) * 1e6), len(data), len(data)))
            parts.append(data)
        return b"".join(parts)


def has_scapy() -> bool:
    """Whether scapy is installed."""
    return importlib.util.find_spec("scapy") is not None


def _packet(data: bytes) -> Any:
    """A packet of scapy, where it is installed; else the bytes."""
    if not has_scapy():
        return data
    from scapy.layers.l2 import Ether

    return Ether(data)


class Network:
    """A port of one bridge."""

    def __init__(self, machine: GuestMachine, bridge: str = BRIDGE, *, mirror: bool = False) -> None:
        """`mirror`: it also sees what goes from one guest to another. MachineError."""
        self._machine: Final = machine
        self.bridge: Final = bridge
        self.mirror: Final = mirror
        _, files = machine.machine.client.request_files("network-port", {"bridge": bridge, "mirror": mirror})
        self._socket: Final = socket.socket(fileno=files[0])
        self._socket.setblocking(False)
        self.capture: Final = Capture()
        """All that this port sent and saw."""
        self._waiting: deque[bytes] = deque()

    def on(self, bridge: str = BRIDGE, *, mirror: bool = False) -> Network:
        """One more port, of this bridge or another; the same as `machine.network(...)`."""
        return self._machine.network(bridge, mirror=mirror)

    def send(self, packet: Any) -> None:
        """Send a packet of scapy, or the bytes of a frame (without check sequence). InputError for what is no frame; MachineError if the
        network does not take it."""
        data = bytes(packet)
        if not MIN_FRAME <= len(data) <= MAX_FRAME:
            raise InputError(
                f"a frame of {len(data)} bytes: an Ethernet frame has {MIN_FRAME} to {MAX_FRAME}"
            )
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self._socket.send(data)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise MachineError(f"{self.bridge}: the network takes no frames") from None
                select.select([], [self._socket], [], SLICE_S)
            except OSError as error:
                raise MachineError(f"{self.bridge}: {os.strerror(error.errno or 0)}") from None
        self.capture.add(data)

    def receive(self, timeout: float = TIMEOUT_S) -> Any:
        """The next frame: a packet of scapy where that is installed, else bytes; None if none comes in time. MachineError if the
        network went away."""
        data = self._next(time.monotonic() + timeout)
        return None if data is None else _packet(data)

    def _take(self) -> bytes | None:
        """A frame that is there, or None."""
        try:
            data = self._socket.recv(MAX_FRAME + 1)
        except BlockingIOError:
            return None
        except OSError as error:
            raise MachineError(f"{self.bridge}: {os.strerror(error.errno or 0)}") from None
        if not data:
            raise MachineError(f"{self.bridge}: the network went away")
        self.capture.add(data)
        return data

    def _next(self, deadline: float) -> bytes | None:
        if self._waiting:
            return self._waiting.popleft()
        while (data := self._take()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            select.select([self._socket], [], [], min(left, SLICE_S))
        return data

    def expect(self, wanted: Any = None, timeout: float = TIMEOUT_S) -> Any:
        """Wait for a frame that fits: `wanted` is a layer of scapy (`ARP`), a function of the packet, or None for any. Frames that
        do not fit are left out; the packet. NetworkFailure says what came instead."""
        fits = _filter(wanted)
        deadline = time.monotonic() + timeout
        seen: list[Any] = []
        while True:
            data = self._next(deadline)
            if data is None:
                break
            packet = _packet(data)
            if fits(packet):
                return packet
            seen.append(packet)
        raise NetworkFailure(self._report(wanted, timeout, seen))

    def ask(self, packet: Any, wanted: Any = None, timeout: float = TIMEOUT_S, tries: int = 3) -> Any:
        """Send a packet and expect an answer; again, `tries` times in all, as one does on a network."""
        seen = ""
        for _ in range(tries):
            self.send(packet)
            try:
                return self.expect(wanted, timeout / tries)
            except NetworkFailure as failure:
                seen = str(failure)
        raise NetworkFailure(f"asked {tries} times; the last time: {seen}")

    def drain(self) -> list[Any]:
        """What has come until now, and is waited for by nobody."""
        out = []
        while (data := self._next(0.0)) is not None:
            out.append(_packet(data))
        return out

    def _report(self, wanted: Any, timeout: float, seen: list[Any]) -> str:
        what = getattr(wanted, "__name__", None) or repr(wanted)
        lines = [f"{self.bridge}: no frame like {what} within {timeout:g} s; {len(seen)} others came"]
        lines += [f"  {_summary(packet)}" for packet in seen[-SHOWN:]]
        with contextlib.suppress(MachineError):
            self._machine.drain()
        for domain in self._machine.domains.values():
            lines += [f"--- the end of {domain.name}'s console ---", domain.console.tail[-800:]]
        return "\n".join(lines)

    def link(self, port: str = "", *, seed: int | None = None, **faults: Any) -> None:
        """What happens from now on to frames on their way from the bridge to a port (`vif1.0`), or to every port: `loss`, `duplicate`,
        `reorder`, `corrupt` from 0 to 1, `delay_ms`, `jitter_ms`, `up=False`; nothing given: nothing any more. With `seed` the same
        frames fare the same. MachineError for what makes no sense."""
        values = {
            **faults,
            **({"port": port} if port else {}),
            **({"seed": seed} if seed is not None else {}),
        }
        self._machine.request("network-link", {"bridge": self.bridge, **values})

    def host(self, address: str = "10.0.0.1/24", *, dhcp: bool = True) -> None:
        """A helper host on this bridge: it answers ARP and ping, and gives out addresses by DHCP (from the network's tenth on). "": none any
        more. MachineError for an address that no host can have."""
        self._machine.request("network-host", {"bridge": self.bridge, "address": address, "dhcp": dhcp})

    def save(self, path: Path | str) -> Path:
        """Write the capture as a pcap file."""
        with contextlib.suppress(MachineError):
            while len(self._waiting) < MAX_WAITING and (data := self._take()) is not None:
                self._waiting.append(data)
        target = Path(path)
        target.write_bytes(self.capture.pcap())
        return target

    def close(self) -> None:
        """Leave the bridge."""
        self._socket.close()


def _filter(wanted: Any) -> Filter:
    if wanted is None:
        return lambda packet: True
    if isinstance(wanted, type):
        return lambda packet: not isinstance(packet, bytes) and packet.haslayer(wanted)
    if callable(wanted):
        return wanted  # type: ignore[no-any-return]  # a function of the user's
    raise InputError(f"expect {wanted!r}: a layer of scapy, a function of the packet, or None")


def _summary(packet: Any) -> str:
    if isinstance(packet, bytes):
        return f"{len(packet)} bytes: {packet[:48].hex(' ')}"
    return str(packet.summary())
