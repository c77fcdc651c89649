"""Each order that the core gives to guests' processes is obeyed by them: a PV guest's, and an HVM guest's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bus.messages.domain import Order
from domains.domu import pv_process
from domains.domu.hvm_process import GuestProcess
from hypervisor.core.orders import ORDERS


class FakeLink:
    """Takes what is sent."""

    def __init__(self, *args: Any) -> None:
        self.sent: list[Any] = []

    def fileno(self) -> int:
        return 0

    def send(self, message: Any) -> None:
        self.sent.append(message)


class FakeEar:
    """Listens to nothing."""

    def __init__(self, ring: Any) -> None: ...

    def add(self, fd: int) -> None: ...


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> GuestProcess:
    monkeypatch.setattr(pv_process, "DomainLink", FakeLink)
    monkeypatch.setattr(pv_process, "Ear", FakeEar)
    monkeypatch.setattr(pv_process, "from_descriptor", lambda fd: None)
    monkeypatch.setattr("socket.socket", lambda fileno: None)
    monkeypatch.setattr("bus.trace_page.of_process", lambda fds: (SimpleNamespace(on=[0]), None))
    start: Any = SimpleNamespace(fds={"keys": 0, "descriptors": 0}, domain=1, role="domu")
    return GuestProcess(start)


@pytest.mark.parametrize("kind", ["pv", "hvm"])
def test_every_order_has_somebody_who_obeys_it(process: GuestProcess, kind: str) -> None:
    """Else a hypercall that is documented as served would answer -ENOSYS."""
    body = {"kind": kind, "max_vcpus": 1, "handle": bytes(16), "emulation_flags": 0, "flags": 0}
    process._configure(Order(order=1, what="configure", body=body), [])
    wanted = {name for name, order in ORDERS.items() if order.to == "guests" or order.to == kind}
    assert len(wanted) > 12
    assert wanted <= process._handlers.keys()
