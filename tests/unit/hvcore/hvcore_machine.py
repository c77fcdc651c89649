"""A machine for tests of the core: memory as byte arrays, calls by the hypercall table, processes played by
the test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bus.abi import domctl
from bus.abi.arch_x86 import xen_arch_domainconfig
from bus.abi.hypercalls import HYPERCALLS, Command, decode, encode
from bus.abi.xen import HYPERVISOR_domctl, HYPERVISOR_event_channel_op, HYPERVISOR_memory_op
from bus.addresses import PAGE_SIZE, DomId, Mfn
from hypervisor.core.config import MachineConfig
from hypervisor.core.core import HypervisorCore
from hypervisor.core.effects import Effect, KillProcess, Order, Reply
from hypervisor.core.orders import ORDERS


class FakeMemory:
    """Frames by MFN; refuses access outside extents."""

    def __init__(self) -> None:
        self.extents: dict[int, int] = {}
        self.frames: dict[int, bytearray] = {}

    def _frame(self, mfn: int) -> bytearray:
        assert any(base <= mfn < base + count for base, count in self.extents.items()), hex(mfn)
        return self.frames.setdefault(mfn, bytearray(PAGE_SIZE))

    def read(self, mfn: Mfn, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= PAGE_SIZE
        return bytes(self._frame(mfn)[offset : offset + length])

    def write(self, mfn: Mfn, offset: int, data: bytes) -> None:
        assert 0 <= offset <= offset + len(data) <= PAGE_SIZE
        self._frame(mfn)[offset : offset + len(data)] = data

    def copy(self, source: Mfn, source_offset: int, target: Mfn, target_offset: int, length: int) -> None:
        self.write(target, target_offset, self.read(source, source_offset, length))

    def clear(self, mfn: Mfn, count: int = 1) -> None:
        for frame in range(mfn, mfn + count):
            self.frames.pop(frame, None)

    def create_extent(self, base: Mfn, frames: int) -> None:
        for other, count in self.extents.items():
            assert base + frames <= other or other + count <= base, "extents overlap"
        self.extents[base] = frames

    def drop_extent(self, base: Mfn) -> None:
        count = self.extents.pop(base)
        assert not any(base <= mfn < base + count for mfn in self.frames)

    def create_window(self, window: int, frames: int) -> None:
        raise AssertionError("the tests of this area map no grants")

    def place(self, mfn: Mfn, window: int, index: int) -> None:
        raise AssertionError("the tests of this area map no grants")

    def restore(self, mfn: Mfn) -> None:
        raise AssertionError("the tests of this area map no grants")

    def drop_window(self, window: int) -> None:
        raise AssertionError("the tests of this area map no grants")


class Answer:
    """A reply, taken apart."""

    def __init__(self, command: Command, reply: Reply) -> None:
        self.rc = reply.rc
        self.raw = reply.data
        message = decode(command, reply.data, reply=True) if reply.data else None
        self.item: Any = message.items[0] if message is not None and message.items else None
        self.payload: Any = message.payload if message is not None else None
        self.arrays: Mapping[str, bytes] = message.arrays if message is not None else {}


class Machine:
    """A core with Dom0, and the processes that a shell would run: orders are acknowledged, killed ones end,
    unless
    the test says otherwise."""

    def __init__(self, config: MachineConfig | None = None) -> None:
        self.memory = FakeMemory()
        self.core = HypervisorCore(self.memory, config or MachineConfig(total_pages=1 << 14))
        self.now = 0
        self.effects: list[Effect] = []
        """All so far."""
        self.replies: dict[int, Reply] = {}
        self.silent: set[int] = set()
        """Domains whose processes answer no order."""
        self.answer_rc: dict[int, int] = {}
        """What domains' processes answer to orders, if not 0."""
        self.unkillable: set[int] = set()
        self._token = 0
        self.core.create_dom0(self.now, max_pages=256)
        self.run()

    def run(self) -> list[Effect]:
        """Carry out effects until there are none; returns them."""
        seen: list[Effect] = []
        while effects := self.core.take_effects():
            seen += effects
            for effect in effects:
                if isinstance(effect, Order):
                    assert effect.kind in ORDERS
                if isinstance(effect, Reply):
                    self.replies[effect.token] = effect
                elif isinstance(effect, Order) and effect.order_id and effect.domain not in self.silent:
                    rc = self.answer_rc.get(effect.domain, 0)
                    self.core.order_done(self.now, effect.domain, effect.order_id, rc, b"")
                elif isinstance(effect, KillProcess) and effect.domain not in self.unkillable:
                    self.core.process_ended(self.now, effect.domain, "killed")
        self.effects += seen
        return seen

    def advance(self, seconds: float) -> list[Effect]:
        """Let time pass, stopping at each deadline."""
        end = self.now + int(seconds * 1e9)
        seen: list[Effect] = []
        while True:
            deadline = self.core.next_deadline()
            self.now = end if deadline is None or deadline > end else max(self.now, deadline)
            self.core.tick(self.now)
            seen += self.run()
            if self.now >= end:
                return seen

    def raw(self, domid: int, nr: int, cmd: int, data: bytes, vcpu: int = 0) -> int:
        """Send a call; its token."""
        self._token += 1
        self.core.call(self.now, DomId(domid), vcpu, self._token, nr, cmd, data)
        self.run()
        return self._token

    def call(
        self, domid: int, nr: int, cmd: int, item: Any = None, arrays: Mapping[str, bytes] | None = None
    ) -> Answer:
        """A call that is answered at once."""
        command = HYPERCALLS[nr].command(cmd)
        assert command is not None
        data = encode(command, [] if item is None else [item], arrays)
        token = self.raw(domid, nr, cmd, data)
        assert token in self.replies, "no reply yet"
        return Answer(command, self.replies.pop(token))

    def event(self, domid: int, cmd: int, item: Any) -> Answer:
        """HYPERVISOR_event_channel_op."""
        return self.call(domid, HYPERVISOR_event_channel_op, cmd, item)

    def memory_op(self, domid: int, cmd: int, item: Any, **arrays: bytes) -> Answer:
        """HYPERVISOR_memory_op."""
        return self.call(domid, HYPERVISOR_memory_op, cmd, item, arrays)

    def domctl_data(
        self, cmd: int, domain: int, payload: Any = None, arrays: Mapping[str, bytes] | None = None
    ) -> bytes:
        """The wire form of a domctl."""
        command = HYPERCALLS[HYPERVISOR_domctl].command(cmd)
        assert command is not None
        packed = command.payload.pack(payload) if payload is not None and command.payload else b""
        version = domctl.XEN_DOMCTL_INTERFACE_VERSION
        item = domctl.xen_domctl(cmd, version, domain, (0, 0, 0), packed.ljust(128, b"\0"))
        return encode(command, [item], arrays)

    def domctl(
        self,
        cmd: int,
        domain: int,
        payload: Any = None,
        arrays: Mapping[str, bytes] | None = None,
        caller: int = 0,
    ) -> Answer:
        """HYPERVISOR_domctl by Dom0."""
        command = HYPERCALLS[HYPERVISOR_domctl].command(cmd)
        assert command is not None
        token = self.raw(caller, HYPERVISOR_domctl, cmd, self.domctl_data(cmd, domain, payload, arrays))
        assert token in self.replies, "no reply yet"
        return Answer(command, self.replies.pop(token))

    def create(
        self,
        *,
        flags: int = 0,
        pages: int = 64,
        vcpus: int = 1,
        domid: int = 0,
        ssidref: int = 0,
        max_evtchn_port: int = 0xFFFFFFFF,
    ) -> int:
        """A domain with its memory range and vCPUs, not populated, paused."""
        spec = domctl.xen_domctl_createdomain(
            ssidref, bytes(range(16)), flags, 0, vcpus, max_evtchn_port, -1, -1, 2, 0, 0,
            xen_arch_domainconfig(0, 0),
        )  # fmt: skip
        answer = self.domctl(domctl.XEN_DOMCTL_createdomain, domid, spec)
        assert answer.rc == 0, answer.rc
        new: int = answer.item.domain
        limit = domctl.xen_domctl_max_mem(pages * 4)
        assert self.domctl(domctl.XEN_DOMCTL_max_mem, new, limit).rc == 0
        assert self.domctl(domctl.XEN_DOMCTL_max_vcpus, new, domctl.xen_domctl_max_vcpus(vcpus)).rc == 0
        return new

    def start(self, domid: int) -> None:
        """First unpause."""
        assert self.domctl(domctl.XEN_DOMCTL_unpausedomain, domid).rc == 0

    def destroy(self, domid: int) -> int:
        """Destroy; the return value."""
        return self.domctl(domctl.XEN_DOMCTL_destroydomain, domid).rc

    def info(self, domid: int) -> Any:
        """XEN_DOMCTL_getdomaininfo of this very domain, or None."""
        answer = self.domctl(domctl.XEN_DOMCTL_getdomaininfo, domid)
        return answer.payload if answer.rc == 0 and answer.payload.domain == domid else None
