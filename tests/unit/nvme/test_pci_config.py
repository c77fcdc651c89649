"""Configuration space as software finds it: BAR sizing, the capability list, what a write changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.hw.pci import BarSpec, ConfigSpace, MsixSpec


def space() -> ConfigSpace:
    return ConfigSpace(
        vendor=0x1AF4,
        device=0x0110,
        class_code=0x010802,
        bars={0: BarSpec(0x4000), 2: BarSpec(0x100, wide=False)},
        msix=MsixSpec(9, 0, 0x2000, 0x3000),
    )


def test_bar_sizing() -> None:
    """All ones written, the size read back; a 64-bit BAR has two halves; what is no BAR stays 0; addresses stick."""
    config = space()
    config.write(0x10, 4, 0xFFFF_FFFF)
    config.write(0x14, 4, 0xFFFF_FFFF)
    assert config.read(0x10, 8) == 0xFFFF_FFFF_FFFF_C004
    config.write(0x18, 4, 0xFFFF_FFFF)
    assert config.read(0x18, 4) == 0xFFFF_FF00
    config.write(0x1C, 4, 0xFFFF_FFFF)
    assert config.read(0x1C, 4) == 0
    config.write(0x10, 8, 0x12_3456_8000)
    assert config.bar_address(0) == 0x12_3456_8000


def test_capability_list() -> None:
    """Power management, PCI Express, MSI-X, in a list that ends."""
    config = space()
    found, at = [], config.read(0x34, 1)
    while at:
        found.append(config.read(at, 1))
        at = config.read(at + 1, 1)
        assert len(found) < 10
    assert found == [0x01, 0x10, 0x11]
    assert config.read(0x100, 4) == 0


def test_power_states() -> None:
    """D3hot switches decoding and DMA off and keeps the registers; D1 is not there."""
    config = space()
    config.write(0x04, 2, 6)
    config.write(0x44, 2, 3)
    assert not config.memory_enabled
    assert not config.bus_master
    config.write(0x44, 2, 1)
    assert config.read(0x44, 2) & 3 == 3
    config.write(0x44, 2, 0)
    assert config.bus_master


@given(
    writes=st.lists(
        st.tuples(st.integers(-4, 4100), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))
    )
)
def test_identity_cannot_be_written(writes: list[tuple[int, int, int]]) -> None:
    """Whatever is written: ids, class, header type, capability pointers and offsets stay."""
    config, fresh = space(), space()
    for offset, size, value in writes:
        config.write(offset, size, value)
    for offset in (0x00, 0x08, 0x2C, 0x34, 0x40, 0x48, 0x88, 0x8C):
        assert config.read(offset, 4) == fresh.read(offset, 4)
    assert config.read(0x0E, 1) == 0


def test_impossible_bars() -> None:
    """Not a power of two, overlapping, outside: ValueError."""
    for bars in ({0: BarSpec(100)}, {0: BarSpec(4096), 1: BarSpec(4096)}, {5: BarSpec(4096)}):
        with pytest.raises(ValueError, match="not possible"):
            ConfigSpace(vendor=1, device=1, class_code=0, bars=bars)
