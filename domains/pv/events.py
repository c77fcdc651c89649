"""Delivery of event channels: the pending and mask bits of the 2-level ABI in the shared info, the words and queues of the FIFO
ABI, the vCPU's upcall flag, and wake-ups.

The hypervisor says which port of the domain became pending for which vCPU; this process is the only writer of the bits
(docs/architecture.md, invariant 7), always between two guest instructions. Sources: xen.h (shared_info, vcpu_info), event_channel.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from bus.abi.event_channel import (
    EVTCHN_2L_NR_CHANNELS,
    EVTCHN_FIFO_LINK_BITS,
    EVTCHN_FIFO_LINKED,
    EVTCHN_FIFO_MASKED,
    EVTCHN_FIFO_NR_CHANNELS,
    EVTCHN_FIFO_PENDING,
    EVTCHN_FIFO_PRIORITY_DEFAULT,
    EVTCHN_FIFO_PRIORITY_MIN,
)
from bus.abi.xen import SHARED_INFO
from bus.addresses import EVTCHNS_PER_BUCKET, PAGE_SHIFT, PAGE_SIZE
from domains.pv.state import VcpuState

PENDING_OFFSET: Final = SHARED_INFO.offset("evtchn_pending")
MASK_OFFSET: Final = SHARED_INFO.offset("evtchn_mask")
WORDS_PER_PAGE: Final = PAGE_SIZE // 4
CONTROL_BLOCK_SIZE: Final = 8 + 4 * (EVTCHN_FIFO_PRIORITY_MIN + 1)
MAX_ARRAY_PAGES: Final = EVTCHN_FIFO_NR_CHANNELS // WORDS_PER_PAGE
_LINK_MASK: Final = (1 << EVTCHN_FIFO_LINK_BITS) - 1
_PENDING: Final = 1 << EVTCHN_FIFO_PENDING
_MASKED: Final = 1 << EVTCHN_FIFO_MASKED
_LINKED: Final = 1 << EVTCHN_FIFO_LINKED
_U32: Final = Struct("<I")


class _Queue:
    """Tail of one FIFO queue (vCPU and priority); its head is in the control block."""

    __slots__ = ("tail",)

    def __init__(self) -> None:
        self.tail = 0


class EventChannels:
    """The event bits of one domain. Offsets are byte indexes into the domain's own memory."""

    def __init__(
        self, octets: memoryview, words: memoryview, shared_info: int, states: Sequence[VcpuState]
    ) -> None:
        self._octets = octets
        self._words = words
        self._states = states
        self._pending = shared_info + PENDING_OFFSET >> 3
        self._mask = shared_info + MASK_OFFSET >> 3
        self._vcpu: dict[int, int] = {}
        self._highest = 0
        self._priority: dict[int, int] = {}
        self._ipi: dict[int, int] = {}
        self._timer: dict[int, int] = {}
        # FIFO state; None while the 2-level ABI is in use.
        self._control: dict[int, int] | None = None
        self._array: list[int] = []
        self._queues: dict[tuple[int, int], _Queue] = {}
        self._early: set[int] = set()

    # --- what the domain bound, as far as delivery needs it

    def bind(self, port: int, vcpu: int, *, ipi: bool = False, timer: bool = False) -> None:
        """A port exists and notifies `vcpu`; it is an IPI channel, or that vCPU's VIRQ_TIMER."""
        if not self.has_vcpu(vcpu):
            return
        self._vcpu[port] = vcpu
        if ipi:
            self._ipi[port] = vcpu
        if timer:
            self._timer[port] = vcpu
            self._states[vcpu].timer_port = port
            self._states[vcpu].periodic_next = 0

    def notify_vcpu(self, port: int, vcpu: int) -> None:
        """EVTCHNOP_bind_vcpu succeeded."""
        if self.has_vcpu(vcpu):
            self._vcpu[port] = vcpu

    def set_priority(self, port: int, priority: int) -> None:
        """EVTCHNOP_set_priority succeeded."""
        self._priority[port] = priority

    def close(self, port: int) -> None:
        """The port is closed: its bits are cleared, as Xen clears them when a port is freed."""
        self._highest = max(self._highest, port)
        self._vcpu.pop(port, None)
        self._ipi.pop(port, None)
        self._priority.pop(port, None)
        self._early.discard(port)
        vcpu = self._timer.pop(port, None)
        if vcpu is not None and self._states[vcpu].timer_port == port:
            self._states[vcpu].timer_port = 0
        self.clear_pending(port)

    def reset(self) -> None:
        """EVTCHNOP_reset succeeded: no port is left, and the ABI is 2-level again."""
        for port in list(self._vcpu):
            self.close(port)
        self._control = None
        self._array.clear()
        self._queues.clear()
        self._early.clear()

    def ipi_target(self, port: int) -> int | None:
        """The vCPU that an IPI channel of this domain notifies; None for any other port."""
        return self._ipi.get(port)

    def vcpu_of(self, port: int) -> int:
        """The vCPU that a port notifies (0 until it was bound otherwise)."""
        return self._vcpu.get(port, 0)

    def known(self, port: int) -> bool:
        """The port was bound or raised here and not closed since."""
        return port in self._vcpu

    def valid(self, port: int) -> bool:
        """The port number is within the ABI in use."""
        return 0 < port < (EVTCHN_2L_NR_CHANNELS if self._control is None else EVTCHN_FIFO_NR_CHANNELS)

    def exists(self, port: int) -> bool:
        """There is a channel of that number, open or not: Xen makes them by the bucket, and never takes one back."""
        if port < EVTCHNS_PER_BUCKET or not self.valid(port):
            return self.valid(port)
        self._highest = max(self._highest, *self._vcpu, 0)
        return port // EVTCHNS_PER_BUCKET <= self._highest // EVTCHNS_PER_BUCKET

    def has_vcpu(self, vcpu: int) -> bool:
        """The domain has a vCPU of that number."""
        return vcpu < len(self._states)

    @property
    def fifo(self) -> bool:
        """The FIFO ABI is in use."""
        return self._control is not None

    # --- FIFO set-up

    def init_control(self, vcpu: int, block: int) -> None:
        """EVTCHNOP_init_control succeeded: the vCPU's control block is at byte `block`. The first call switches the ABI:
        what is pending by the 2-level bits is carried over once its word exists."""
        if self._control is None:
            words = self._words
            for port in self._vcpu:
                if port < EVTCHN_2L_NR_CHANNELS and words[self._pending + (port >> 6)] >> (port & 63) & 1:
                    self._early.add(port)
            self._control = {}
        self._octets[block : block + CONTROL_BLOCK_SIZE] = bytes(CONTROL_BLOCK_SIZE)
        self._control[vcpu] = block

    def expand_array(self, page: int) -> None:
        """EVTCHNOP_expand_array succeeded: the next page of event words is at byte `page`."""
        self._array.append(page)
        for port in sorted(p for p in self._early if p // WORDS_PER_PAGE < len(self._array)):
            self._early.discard(port)
            self.set_pending(port, self._vcpu.get(port, 0))

    def control_frames(self) -> list[int]:
        """Byte indexes of the frames that hold FIFO state."""
        blocks = list(self._control.values()) if self._control else []
        return sorted({block >> PAGE_SHIFT << PAGE_SHIFT for block in blocks} | set(self._array))

    def _word(self, port: int) -> int | None:
        page = port // WORDS_PER_PAGE
        if page >= len(self._array):
            return None
        return self._array[page] + 4 * (port % WORDS_PER_PAGE)

    # --- the bits

    def set_pending(self, port: int, vcpu: int) -> None:
        """The port became pending: set its bit, mark the vCPU if it is not masked, wake whom it wakes."""
        self._vcpu[port] = vcpu
        state = self._states[vcpu]
        if self._control is not None:
            self._fifo_set_pending(port, state)
            return
        if port >= EVTCHN_2L_NR_CHANNELS:
            return
        words = self._words
        index = port >> 6
        bit = 1 << (port & 63)
        value = words[self._pending + index]
        if value & bit:
            return
        words[self._pending + index] = value | bit
        if not words[self._mask + index] & bit:
            self._select(state, index)
        self._check_pollers(port)

    def _select(self, state: VcpuState, index: int) -> None:
        if state.info < 0:
            return  # no vcpu_info yet: Xen keeps such events in a dummy, and registering one makes all count as pending
        selector = (state.info >> 3) + 1
        value = self._words[selector]
        if not value >> index & 1:
            self._words[selector] = value | 1 << index
            self._mark(state)

    def _mark(self, state: VcpuState) -> None:
        """vcpu_mark_events_pending: the upcall flag goes up, and a blocked vCPU runs again."""
        octets = self._octets
        if state.info < 0 or octets[state.info]:
            return
        octets[state.info] = 1
        state.wake()

    def clear_pending(self, port: int) -> None:
        """Take the pending bit away (the port is freed)."""
        if self._control is not None:
            word = self._word(port)
            if word is not None:
                self._put(word, self._get(word) & ~_PENDING)
        elif port < EVTCHN_2L_NR_CHANNELS:
            self._words[self._pending + (port >> 6)] &= ~(1 << (port & 63))

    def is_pending(self, port: int) -> bool:
        """The port's pending bit."""
        if self._control is not None:
            word = self._word(port)
            return port in self._early if word is None else bool(self._get(word) & _PENDING)
        return port < EVTCHN_2L_NR_CHANNELS and bool(
            self._words[self._pending + (port >> 6)] >> (port & 63) & 1
        )

    def is_masked(self, port: int) -> bool:
        """The port's mask bit."""
        if self._control is not None:
            word = self._word(port)
            return word is None or bool(self._get(word) & _MASKED)
        return port >= EVTCHN_2L_NR_CHANNELS or bool(self._words[self._mask + (port >> 6)] >> (port & 63) & 1)

    def unmask(self, port: int) -> None:
        """EVTCHNOP_unmask: clear the mask bit and deliver what was pending behind it."""
        state = self._states[self._vcpu.get(port, 0)]
        if self._control is not None:
            word = self._word(port)
            if word is None:
                return
            value = self._get(word) & ~_MASKED
            self._put(word, value)
            if value & _PENDING:
                self._fifo_set_pending(port, state)
            return
        if port >= EVTCHN_2L_NR_CHANNELS:
            return
        words = self._words
        index = port >> 6
        bit = 1 << (port & 63)
        mask = words[self._mask + index]
        if not mask & bit:
            return
        words[self._mask + index] = mask & ~bit
        if words[self._pending + index] & bit:
            self._select(state, index)

    # --- FIFO queues

    def _get(self, offset: int) -> int:
        value: int = _U32.unpack_from(self._octets, offset)[0]
        return value

    def _put(self, offset: int, value: int) -> None:
        _U32.pack_into(self._octets, offset, value)

    def _fifo_set_pending(self, port: int, state: VcpuState) -> None:
        word = self._word(port)
        if word is None:
            self._early.add(port)
            return
        value = self._get(word)
        was_pending = bool(value & _PENDING)
        value |= _PENDING
        block = self._control.get(state.id) if self._control else None
        if not value & (_MASKED | _LINKED) and block is not None:
            value |= _LINKED
            self._put(word, value)
            self._link(port, word, state, block)
        else:
            self._put(word, value)
        if not was_pending:
            self._check_pollers(port)

    def _link(self, port: int, word: int, state: VcpuState, block: int) -> None:
        """Append a LINKED word to the queue of its vCPU and priority."""
        priority = self._priority.get(port, EVTCHN_FIFO_PRIORITY_DEFAULT)
        queue = self._queues.setdefault((state.id, priority), _Queue())
        self._put(word, self._get(word) & ~_LINK_MASK)
        appended = False
        if queue.tail and queue.tail != port:
            tail = self._word(queue.tail)
            if tail is not None:
                value = self._get(tail)
                if value & _LINKED:  # still in the queue: the guest has not consumed it
                    self._put(tail, value & ~_LINK_MASK | port)
                    appended = True
        queue.tail = port
        if appended:
            return
        self._put(block + 8 + 4 * priority, port)
        ready = self._get(block)
        if not ready >> priority & 1:
            self._put(block, ready | 1 << priority)
            self._mark(state)

    # --- poll

    def _check_pollers(self, port: int) -> None:
        for state in self._states:
            ports = state.poll_ports
            if ports is not None and (port in ports or not ports):
                state.wake()
