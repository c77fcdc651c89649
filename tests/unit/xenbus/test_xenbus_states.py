"""Transitions of split devices: every reaction is a legal step, and two ends that react to each other
meet."""

from __future__ import annotations

import itertools

import pytest

from drivers.xenbus.states import (
    LEGAL,
    End,
    XenbusState,
    backend_reaction,
    frontend_reaction,
    is_legal,
    parse_state,
    state_text,
)

S = XenbusState


@pytest.mark.parametrize("text", [None, b"", b"x", b"-1", b"9", b"99", b"4 ", b"004", "４".encode(), b"4\0"])
def test_anything_but_a_states_number_is_unknown(text: bytes | None) -> None:
    assert parse_state(text) == S.Unknown


def test_texts_round_trip() -> None:
    assert [parse_state(state_text(state)) for state in S] == list(S)


def test_tables_are_complete() -> None:
    for end in End:
        assert set(LEGAL[end]) == set(S)


def test_every_reaction_is_a_legal_transition() -> None:
    for own, peer, online in itertools.product(S, S, (True, False)):
        back = backend_reaction(own, peer, online)
        assert back.enter is None or is_legal(End.BACKEND, own, back.enter), (own, peer, back)
        front = frontend_reaction(own, peer)
        assert front.enter is None or is_legal(End.FRONTEND, own, front.enter), (own, peer, front)


def test_illegal_steps() -> None:
    assert not is_legal(End.FRONTEND, S.Closed, S.Connected)
    assert not is_legal(End.BACKEND, S.Closed, S.Connected)
    assert not is_legal(End.BACKEND, S.Closing, S.Connected)
    assert is_legal(End.BACKEND, S.Closed, S.Closed)


def settle(front: XenbusState, back: XenbusState, online: bool = True) -> tuple[XenbusState, XenbusState]:
    for _ in range(20):
        new_back = backend_reaction(back, front, online).enter
        back = back if new_back is None else new_back
        new_front = frontend_reaction(front, back).enter
        if new_back is None and new_front is None:
            return front, back
        front = front if new_front is None else new_front
    raise AssertionError("the two ends chase each other for ever")


def test_the_usual_way_up() -> None:
    assert settle(S.Initialising, S.Initialising) == (S.Connected, S.Connected)


def test_either_end_can_close() -> None:
    assert settle(S.Closing, S.Connected)[1] in (S.Closing, S.Closed)
    assert settle(S.Connected, S.Closing)[0] == S.Closed
    assert settle(S.Closed, S.Connected) == (S.Closed, S.Closed)


@pytest.mark.parametrize("back", [S.Closed, S.Closing, S.Connected, S.Initialised])
def test_a_frontend_that_starts_anew_is_connected_again(back: XenbusState) -> None:
    """kexec, or a driver bound again: the backend lets go of the old rings first."""
    reaction = backend_reaction(back, S.Initialising, online=True)
    assert reaction.enter == S.InitWait
    assert reaction.disconnect == (back != S.Closed)
    assert settle(S.Initialising, back) == (S.Connected, S.Connected)


def test_a_backend_that_starts_anew_is_connected_again() -> None:
    """A driver domain that was restarted writes InitWait while the frontend still is Connected."""
    reaction = frontend_reaction(S.Connected, S.InitWait)
    assert reaction.disconnect
    assert reaction.connect
    assert settle(S.Connected, S.InitWait) == (S.Connected, S.Connected)


def test_the_device_goes_when_it_is_offline_or_its_peers_node_is_gone() -> None:
    assert backend_reaction(S.Connected, S.Closed, online=False).remove
    assert not backend_reaction(S.Connected, S.Closed, online=True).remove
    assert backend_reaction(S.Connected, S.Unknown, online=True).remove
    assert frontend_reaction(S.Connected, S.Unknown).remove


def test_all_pairs_settle() -> None:
    for front, back, online in itertools.product(S, S, (True, False)):
        settle(front, back, online)


def test_a_reconfiguration_ends_connected_whoever_asks() -> None:
    assert settle(S.Reconfiguring, S.Connected) == (S.Connected, S.Connected)
    assert settle(S.Connected, S.Reconfiguring) == (S.Connected, S.Connected)
