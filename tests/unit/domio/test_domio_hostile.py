"""DomIO against a device process that is not to be trusted: what it says of itself is checked before a register is named by it."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.messages.device import DeviceAccess
from domains.domio.hardware import NvmePort


class Host:
    """Configuration space is what the test says; each access must be one that a message can carry."""

    def __init__(self, config: dict[int, int]) -> None:
        self.config = config
        self.written: list[tuple[int, int]] = []

    def _check(self, space: int, offset: int, size: int) -> None:
        DeviceAccess(token=1, bdf=8, space=space, offset=offset, size=cast(Any, size), write=False)

    def device_read(self, bdf: int, space: int, offset: int, size: int) -> int:
        self._check(space, offset, size)
        return self.config.get(offset, 0)

    def device_write(self, bdf: int, space: int, offset: int, size: int, value: int) -> None:
        self._check(space, offset, size)
        self.written.append((space, offset))


def port(table: int) -> tuple[NvmePort, Host]:
    """A device whose MSI-X table is there."""
    host = Host({0: 0x1234, 0x34: 0x50, 0x50: 0x11, 0x54: table})
    return NvmePort(cast(Any, host), 8), host


def test_an_msix_table_where_one_can_be() -> None:
    """The table is in BAR 0 at 0x2000."""
    one, host = port(0x2000)
    assert one.unmask(2)
    assert (0, 0x2000) in host.written


@pytest.mark.parametrize("table", [6, 7, 0x2006, 0xFFFFFFF8, 0xFFFFFFF0])
def test_an_msix_table_where_none_can_be(table: int) -> None:
    """A BAR that does not exist, or beyond its end: the device is not used."""
    one, host = port(table)
    assert not one.unmask(2)
    assert all(space < 0 for space, _ in host.written)


@given(st.dictionaries(st.integers(0, 255), st.integers(0, 0xFFFFFFFF)))
def test_configuration_space_of_any_kind(config: dict[int, int]) -> None:
    """Nothing is raised."""
    NvmePort(cast(Any, Host(config)), 8).unmask(2)
