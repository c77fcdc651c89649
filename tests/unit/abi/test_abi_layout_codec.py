"""Layouts convert exactly, refuse what does not fit with a LayoutError, and are fast enough for every hypercall."""

from __future__ import annotations

import timeit
from typing import Annotated, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.abi.event_channel import EVTCHN_BIND_VIRQ, EVTCHN_STATUS, EVTCHN_STATUS_INTERDOMAIN, evtchn_bind_virq
from bus.abi.layout import Array, Bytes, Layout, LayoutError, Union, i16, u8, u16, u32, u64
from bus.abi.xen import SHARED_INFO, START_INFO


class inner(NamedTuple):
    a: u8
    b: u32


class outer(NamedTuple):
    tag: u8
    items: Annotated[tuple[inner, ...], Array(inner, 2)]
    name: Annotated[bytes, Bytes(3)]
    u: Annotated[bytes, Union(one=u16, pair=inner)]
    last: i16


OUTER = Layout(outer)
PACKED = Layout(outer, packed=True)


def test_offsets_follow_the_c_rules_with_and_without_padding() -> None:
    assert [OUTER.offset(f) for f in OUTER.fields] == [0, 4, 20, 24, 32]
    assert (OUTER.size, OUTER.align) == (36, 4)
    assert [PACKED.offset(f) for f in PACKED.fields] == [0, 1, 11, 14, 19]
    assert PACKED.size == 21


@given(
    st.integers(0, 255),
    st.tuples(*[st.builds(inner, st.integers(0, 255), st.integers(0, 2**32 - 1))] * 2),
    st.binary(min_size=3, max_size=3),
    st.binary(min_size=8, max_size=8),
    st.integers(-(2**15), 2**15 - 1),
)
def test_what_is_packed_is_unpacked(
    tag: int, items: tuple[inner, ...], name: bytes, union: bytes, last: int
) -> None:
    value = outer(tag, items, name, union, last)
    assert OUTER.unpack(b"??" + OUTER.pack(value), 2) == value
    assert PACKED.unpack(PACKED.pack(value._replace(u=union[:5]))) == value._replace(u=union[:5])


@given(st.binary(max_size=60))
def test_any_bytes_unpack_or_are_refused(data: bytes) -> None:
    if len(data) >= OUTER.size:
        assert OUTER.pack(OUTER.unpack(data))[:1] == data[:1]
    else:
        with pytest.raises(LayoutError):
            OUTER.unpack(data)


ZERO = OUTER.zero()


@pytest.mark.parametrize(
    "bad",
    [
        ZERO._replace(tag=256),
        ZERO._replace(tag=-1),
        ZERO._replace(last=2**15),
        ZERO._replace(name=b"ab"),
        ZERO._replace(name=b"abcd"),
        ZERO._replace(u=bytes(9)),
        ZERO._replace(items=(inner(0, 0),)),
        ZERO._replace(items=(inner(0, 0), inner(0, 2**32))),
        ZERO._replace(tag="x"),  # type: ignore[arg-type]  # the wrong type is what is tested
    ],
)
def test_values_that_do_not_fit_are_refused(bad: outer) -> None:
    with pytest.raises(LayoutError, match="outer"):
        OUTER.pack(bad)


def test_a_union_may_be_given_one_members_bytes() -> None:
    status = EVTCHN_STATUS.zero()._replace(u=EVTCHN_STATUS_INTERDOMAIN.pack(EVTCHN_STATUS_INTERDOMAIN.zero()))
    assert len(EVTCHN_STATUS.pack(status)) == EVTCHN_STATUS.size
    assert OUTER.unpack(OUTER.pack(ZERO._replace(u=b"\x01"))).u == b"\x01" + bytes(7)


def test_padding_is_written_as_zero_and_not_read() -> None:
    ones = b"\xff" * OUTER.size
    assert OUTER.pack(OUTER.unpack(ones))[1:4] == bytes(3)


def test_pack_into_stays_in_the_buffer() -> None:
    buffer = bytearray(40)
    OUTER.pack_into(buffer, 4, ZERO._replace(tag=7))
    assert buffer[4] == 7
    for offset in (-1, 5, 40):
        with pytest.raises(LayoutError, match="outside"):
            OUTER.pack_into(buffer, offset, ZERO)
    assert len(buffer) == 40


def test_arrays_of_structures() -> None:
    items = [inner(n, n) for n in range(3)]
    layout = Layout(inner)
    assert layout.unpack_array(b"".join(map(layout.pack, items)), 3) == items
    with pytest.raises(LayoutError):
        layout.unpack_array(bytes(8), 2)


def test_an_annotation_that_is_no_abi_type_is_a_type_error() -> None:
    class wrong(NamedTuple):
        a: int

    with pytest.raises(TypeError, match="not an ABI type"):
        Layout(wrong).size  # noqa: B018  # measured when first asked for


def test_big_pages_fit_where_xen_puts_them() -> None:
    assert SHARED_INFO.size <= 4096
    assert START_INFO.offset("cmd_line") + START_INFO.field_size("cmd_line") <= 4096


def test_a_flat_structure_takes_about_a_microsecond() -> None:
    """Generous, for a loaded machine: measured 0.3 microseconds each way on an idle one."""
    value = evtchn_bind_virq(1, 2, 3)
    data = EVTCHN_BIND_VIRQ.pack(value)
    for action in (lambda: EVTCHN_BIND_VIRQ.pack(value), lambda: EVTCHN_BIND_VIRQ.unpack(data)):
        assert min(timeit.repeat(action, number=2000, repeat=7)) / 2000 < 5e-6


def test_u64_is_unsigned() -> None:
    class one(NamedTuple):
        a: u64

    assert Layout(one).unpack(b"\xff" * 8).a == 2**64 - 1
