"""The parts fit the interfaces in domains.pv.api (checked by mypy), and the frames keep ownership apart."""

from __future__ import annotations

import pytest

from bus.addresses import DomId, Mfn
from domains.pv.api import GuestFrames, PagingApi, PagingHost
from domains.pv.frames import DomainFrames
from tests.unit.pvmm.pvmm_support import BASE, FakeHost, Guest


def test_parts_implement_the_interfaces() -> None:
    guest = Guest()
    api: PagingApi = guest.mmu
    frames: GuestFrames = guest.frames
    host: PagingHost = FakeHost()
    assert api is guest.mmu
    assert frames is guest.frames
    assert host.is_kernel_mode()


def test_frames_know_owner_heap_and_grants() -> None:
    frames = DomainFrames(memoryview(bytearray(4 << 12)), 100, 3, populated=[100, 101], shared=[103])
    assert frames.owned(Mfn(100))
    assert not frames.owned(Mfn(102))
    assert not frames.owned(Mfn(103))
    assert not frames.owned(Mfn(99))
    assert frames.shared_by_xen(Mfn(103))
    assert not frames.shared_by_xen(Mfn(100))
    assert frames.page(Mfn(102)) is None
    page = frames.page(Mfn(101))
    assert page is not None
    page[5] = 7
    assert frames.octets[4096 + 5] == 7
    granted = memoryview(bytearray(4096))
    frames.add_foreign(Mfn(7), DomId(3), granted, writable=False)
    assert frames.foreign(Mfn(7)) == (3, False)
    view = frames.page(Mfn(7))
    assert view is not None
    assert view.readonly
    frames.remove_foreign(Mfn(7))
    assert frames.page(Mfn(7)) is None


def test_frames_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="whole pages"):
        DomainFrames(memoryview(bytearray(100)), 0, 0)
    with pytest.raises(ValueError, match="do not fit"):
        DomainFrames(memoryview(bytearray(4096)), 0, 2)
    with pytest.raises(ValueError, match="writable"):
        DomainFrames(memoryview(bytes(4096)), 0, 1)
    frames = DomainFrames(memoryview(bytearray(2 << 12)), BASE, 1)
    with pytest.raises(ValueError, match="RAM range"):
        frames.set_owned(Mfn(BASE + 1), True)
    with pytest.raises(ValueError, match="Xen-heap"):
        frames.share(Mfn(BASE), True)
    with pytest.raises(ValueError, match="own"):
        frames.add_foreign(Mfn(BASE), DomId(1), memoryview(bytearray(4096)), writable=True)
