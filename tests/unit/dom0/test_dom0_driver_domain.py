"""A driver domain is started once, and one that cannot be started leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus.addresses import DomId, Port
from domains.dom0.toolstack.disks import DiskError, Disks
from domains.dom0.toolstack.driver_domain import DriverDomain, DriverDomainBusy
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import HypercallError
from domains.native.reactor import Reactor

DOMID = DomId(5)
ENOMEM = 12


class Control:
    """The hypervisor's part: it fails at one call."""

    def __init__(self, failing: str) -> None:
        self.failing = failing
        self.destroyed: list[DomId] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == self.failing:
                raise HypercallError(ENOMEM, name)
            return DOMID

        return call

    def destroy(self, domid: DomId) -> None:
        self.destroyed.append(domid)


def driver_with(failing: str) -> tuple[DriverDomain, Control, XenstoreService]:
    """A driver domain, what it is made through, and the store."""
    host = cast(Any, SimpleNamespace(reactor=Reactor(), on_order={}, alloc_unbound=lambda domid, remote: 1))
    store = XenstoreService(host)
    control = Control(failing)
    driver = DriverDomain(host, store, cast(Any, control), lambda text: None, name="DomIO", role=1, pages=16)
    return driver, control, store


@pytest.mark.parametrize("failing", ["max_vcpus", "max_mem", "populate", "set_hvm_param"])
def test_a_native_driver_domain_that_cannot_be_built_is_destroyed(failing: str) -> None:
    driver, control, _ = driver_with(failing)
    with pytest.raises(HypercallError, match=failing):
        driver.start()
    assert control.destroyed == [DOMID]
    assert driver.domid is None


def test_one_that_cannot_be_introduced_leaves_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, _, store = driver_with("none")

    def refuse(domid: DomId, port: Port) -> None:
        assert store.read(f"/local/domain/{domid}/name") == "DomIO"
        raise HypercallError(ENOMEM, "bind_interdomain")

    monkeypatch.setattr(store, "introduce", refuse)
    with pytest.raises(HypercallError, match="bind_interdomain"):
        driver._make_known(DOMID, Port(1), 16)
    assert store.read(f"/local/domain/{DOMID}/name") is None


def test_while_it_starts_nobody_else_starts_it() -> None:
    driver, _, _ = driver_with("none")
    busy = pytest.raises(DriverDomainBusy, match="DomIO is being started")
    with driver.being_started(), busy, driver.being_started():
        pytest.fail("twice")
    with pytest.raises(ValueError, match="its end"), driver.being_started():
        raise ValueError("its end")
    with driver.being_started():
        pass


def test_a_disk_that_is_asked_for_while_domio_starts_is_refused() -> None:
    started = 0

    def start() -> None:
        nonlocal started
        started += 1
        with pytest.raises(DiskError, match="DomIO is being started"):
            disks.attach(DomId(3), {"vdev": "xvdb"}, 9)
        raise HypercallError(ENOMEM, "create_domain")

    host = cast(Any, SimpleNamespace(reactor=Reactor(), on_order={}))
    disks = Disks(host, XenstoreService(host), cast(Any, Control("none")), cast(Any, None), lambda text: None)
    disks.driver.start = start  # type: ignore[assignment]
    with pytest.raises(HypercallError, match="create_domain"):
        disks.attach(DomId(3), {"vdev": "xvda"}, 8)
    assert started == 1
    assert disks.disks == {}
