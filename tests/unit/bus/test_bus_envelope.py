"""Messages: what was encoded comes back; whatever else arrives is a BadMessage with a reason, never another exception."""

from __future__ import annotations

from typing import cast

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.messages import domain as dm
from bus.messages.envelope import (
    MAX_DATA,
    MAX_MESSAGE,
    VERSION,
    BadMessage,
    Message,
    decode,
    encode,
    registry,
)

MESSAGES = [
    dm.Hello(pid=7, role="domu"),
    dm.Hypercall(token=1 << 63, vcpu=127, nr=63, cmd=0xFFFFFFFF, data=b"x" * 4096),
    dm.OrderDone(order=3, rc=-22, data=b"\0\1"),
    dm.Report(what="log", body={"text": "hello", "list": [1, 2]}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m.KIND)
def test_round_trip(message: Message) -> None:
    """Each kind survives encoding."""
    assert decode(encode(message), dm.FROM_DOMAIN) == message


def test_raised_pairs_survive() -> None:
    """Lists stand for pairs on the wire."""
    message = dm.Raised(events=[(5, 0), (4096, 3)])
    assert decode(encode(message), dm.TO_DOMAIN) == message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token", -1),
        ("token", "1"),
        ("vcpu", 128),
        ("nr", 64),
        ("nr", True),
        ("cmd", 1 << 32),
        ("data", "text"),
        ("extra", 1),
    ],
)
def test_field_out_of_range_is_refused(field: str, value: object) -> None:
    """Every bound of a hypercall message is checked, and the reason names the field."""
    fields = {"token": 1, "vcpu": 0, "nr": 32, "cmd": 4, "data": b"", field: value}
    with pytest.raises(BadMessage, match=field):
        decode(msgpack.packb([VERSION, "hypercall", fields]), dm.FROM_DOMAIN)


def test_other_version_is_refused() -> None:
    """Both ends must speak the same version."""
    with pytest.raises(BadMessage, match="version"):
        decode(msgpack.packb([VERSION + 1, "hello", {"pid": 1, "role": "x"}]), dm.FROM_DOMAIN)


def test_kind_of_the_other_direction_is_refused() -> None:
    """A domain cannot send what only the hypervisor sends."""
    with pytest.raises(BadMessage, match="unknown kind"):
        decode(encode(dm.HypercallReply(token=1, rc=0)), dm.FROM_DOMAIN)


def test_too_much_data_is_refused_at_both_ends() -> None:
    """The caps hold when encoding and when decoding."""
    with pytest.raises(ValueError, match="data"):
        dm.Hypercall(token=1, vcpu=0, nr=1, cmd=1, data=b"x" * (MAX_DATA + 1))
    raw = msgpack.packb(
        [VERSION, "hypercall", {"token": 1, "vcpu": 0, "nr": 1, "cmd": 1, "data": b"x" * MAX_MESSAGE}]
    )
    with pytest.raises(BadMessage, match="limit"):
        decode(raw, dm.FROM_DOMAIN)


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1, object(), {"a": {1, 2}}, "\ud800", [[1 << 70]]])
def test_what_has_no_form_on_the_bus_is_a_bad_message(value: object) -> None:
    """Numbers of more than 64 bits, lone surrogates, objects: the sender gets the one exception that it expects."""
    with pytest.raises(BadMessage, match="order"):
        encode(dm.Order(order=0, what="x", body={"value": value}))


def test_deep_nesting_is_refused() -> None:
    """A message that nests without end does not exhaust the stack."""
    with pytest.raises(BadMessage):
        decode(b"\x91" * 60_000, dm.FROM_DOMAIN)


@given(st.binary(max_size=2000))
def test_garbage_is_a_bad_message(raw: bytes) -> None:
    """No bytes make the decoder raise anything else."""
    with pytest.raises(BadMessage):
        decode(raw, dm.FROM_DOMAIN)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.binary(max_size=40)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)


@given(st.sampled_from(sorted(dm.FROM_DOMAIN)), JSON)
def test_well_formed_nonsense_validates_or_is_refused(kind: str, fields: object) -> None:
    """Right envelope, any content: a message of that kind, or BadMessage."""
    raw = msgpack.packb([VERSION, kind, fields], use_bin_type=True)
    try:
        message = decode(raw, dm.FROM_DOMAIN)
    except BadMessage:
        return
    assert kind == message.KIND


def test_two_models_of_one_kind_cannot_be_registered() -> None:
    """A registry is unambiguous."""
    with pytest.raises(TypeError, match="twice"):
        registry(dm.Hello, dm.Hello)


def test_what_cannot_be_encoded_leaves_nothing_behind() -> None:
    """The packer is kept: a message that fails must not be the beginning of the next."""
    good = dm.Hello(pid=7, role="domu")
    before = encode(good)
    for nonsense in (object(), [1, {"a": object()}], 1 << 70):
        with pytest.raises(BadMessage):
            encode(dm.Hello.model_construct(pid=cast(int, nonsense), role="domu"))
        assert encode(good) == before
