"""Event channels of an HVM domain: as for PV, with the upcall as an interrupt, and with the 32-bit layout of the shared info."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from domains.hvm.state import HvmState
from domains.pv.events import EventChannels
from domains.pv.state import VcpuState

COMPAT_PORTS: Final = 1024
COMPAT_PENDING: Final = 32 * 64
COMPAT_MASK: Final = COMPAT_PENDING + COMPAT_PORTS // 8
COMPAT_WALL_CLOCK: Final = COMPAT_MASK + COMPAT_PORTS // 8
"""Offsets in struct shared_info of a 32-bit guest: 32 vcpu_info of 64 bytes, then two bitmaps of 1024 ports (xen.h)."""
COMPAT_SELECTOR: Final = 4
"""evtchn_pending_sel in struct vcpu_info of a 32-bit guest."""


class HvmEvents(EventChannels):
    """`asserted` is called when a vCPU's upcall flag goes up."""

    def __init__(
        self,
        octets: memoryview,
        words: memoryview,
        shared_info: int,
        states: Sequence[HvmState],
        asserted: Callable[[HvmState], None],
    ) -> None:
        super().__init__(octets, words, shared_info, states)
        self._shared = shared_info
        self._asserted = asserted
        self.compat = False

    def _mark(self, state: VcpuState) -> None:
        if state.info < 0 or self._octets[state.info]:
            return
        super()._mark(state)
        assert isinstance(state, HvmState)
        self._asserted(state)

    def valid(self, port: int) -> bool:
        """As for PV; 1,024 ports with the 2-level ABI of a 32-bit guest."""
        return super().valid(port) and (not self._bits32 or port < COMPAT_PORTS)

    @property
    def _bits32(self) -> bool:
        return self.compat and self._control is None

    def _bit(self, base: int, port: int) -> tuple[int, int]:
        """(byte index of the 32-bit word, bit) of a port in a bitmap."""
        return self._shared + base + 4 * (port >> 5), 1 << (port & 31)

    def _select32(self, state: VcpuState, port: int) -> None:
        if state.info < 0:
            return
        place = state.info + COMPAT_SELECTOR
        value = self._get(place)
        if not value >> (port >> 5) & 1:
            self._put(place, value | 1 << (port >> 5))
            self._mark(state)

    def set_pending(self, port: int, vcpu: int) -> None:
        """See EventChannels."""
        if not self._bits32:
            super().set_pending(port, vcpu)
            return
        if port >= COMPAT_PORTS:
            return
        self._vcpu[port] = vcpu
        word, bit = self._bit(COMPAT_PENDING, port)
        value = self._get(word)
        if value & bit:
            return
        self._put(word, value | bit)
        if not self.is_masked(port):
            self._select32(self._states[vcpu], port)
        self._check_pollers(port)

    def clear_pending(self, port: int) -> None:
        """See EventChannels."""
        if not self._bits32:
            super().clear_pending(port)
        elif port < COMPAT_PORTS:
            word, bit = self._bit(COMPAT_PENDING, port)
            self._put(word, self._get(word) & ~bit)

    def is_pending(self, port: int) -> bool:
        """See EventChannels."""
        if not self._bits32:
            return super().is_pending(port)
        word, bit = self._bit(COMPAT_PENDING, port)
        return port < COMPAT_PORTS and bool(self._get(word) & bit)

    def is_masked(self, port: int) -> bool:
        """See EventChannels."""
        if not self._bits32:
            return super().is_masked(port)
        word, bit = self._bit(COMPAT_MASK, port)
        return port >= COMPAT_PORTS or bool(self._get(word) & bit)

    def unmask(self, port: int) -> None:
        """See EventChannels."""
        if not self._bits32:
            super().unmask(port)
            return
        if port >= COMPAT_PORTS or not self.is_masked(port):
            return
        word, bit = self._bit(COMPAT_MASK, port)
        self._put(word, self._get(word) & ~bit)
        if self.is_pending(port):
            self._select32(self._states[self._vcpu.get(port, 0)], port)
