"""The roster of containers: who takes which process, what becomes of it, and that an agent that lies changes nothing of others'."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolstack.warden.roster import (
    BEGIN_S,
    LOST_S,
    PLACE_S,
    SAY_S,
    AgentSpec,
    Drop,
    Give,
    Lie,
    Over,
    Pass,
    Roster,
    State,
)

SPECS = [
    "hypervisor:1:1:hypervisor",
    "dom0:2:2:dom0",
    "domio:3:3:domio",
    "pv:4:4:domu=pv",
    "any:5:5:domu",
]


def roster(*connected: str) -> Roster:
    """With these agents enrolled."""
    made = Roster.of(map(AgentSpec.parse, SPECS))
    for name in connected:
        assert made.enrolled(0.0, name) == []
    return made


@pytest.mark.parametrize(
    "text",
    ["", "a", "a:1:1", "a:1:1:", "A:1:1:domu", "a:x:1:domu", "a:1:1:domu=", "a:1:1:domu=pv=x", "a:-1:1:domu", "a/b:1:1:domu"],
)  # fmt: skip
def test_a_bad_agent_is_named(text: str) -> None:
    """One line that shows what was given and what is expected."""
    with pytest.raises(ValueError, match="expected NAME:UID:GID:ROLE"):
        AgentSpec.parse(text)


def test_a_machine_needs_its_hypervisor_and_dom0() -> None:
    """And no name twice."""
    with pytest.raises(ValueError, match="no agent has the role hypervisor"):
        Roster.of([AgentSpec.parse("dom0:2:2:dom0")])
    with pytest.raises(ValueError, match="'dom0' is named twice"):
        Roster.of([AgentSpec.parse("dom0:2:2:dom0")] * 2)


def test_a_process_goes_to_the_container_for_its_kind_before_one_for_any() -> None:
    """And a kind that no container is for goes to one that takes any."""
    made = roster("any", "pv")
    assert made.spawn(0.0, 1, "domu", "pv", 1) == [Give(1, "pv")]
    assert made.spawn(0.0, 2, "domu", "pv", 2) == [Give(2, "any")]
    assert roster("any", "pv").spawn(0.0, 1, "domu", "hvm", 1) == [Give(1, "any")]


def test_a_driver_domain_that_is_a_guest_program_takes_no_guests_container() -> None:
    """It has one of its own, which no guest takes."""
    made = Roster.of(map(AgentSpec.parse, [*SPECS[:4], "domio-guest:6:6:domu=driver"]))
    for name in ("pv", "domio-guest"):
        made.enrolled(0.0, name)
    assert made.spawn(0.0, 1, "domu", "driver", 1) == [Give(1, "domio-guest")]
    assert made.spawn(0.0, 2, "domu", "pv", 2) == [Give(2, "pv")]
    assert made.spawn(0.0, 3, "domu", "driver", 3) == []
    assert made.spawn(0.0, 4, "domu", "pv", 4) == []


def test_a_role_without_container_is_refused_at_once() -> None:
    """The hypervisor is not left waiting for what cannot come."""
    (over,) = roster().spawn(0.0, 1, "nvme", "", 1)
    assert isinstance(over, Over)
    assert "no container of this machine takes a process of role nvme" in over.text


def test_a_process_waits_for_its_container_within_a_bound() -> None:
    """One that enrols in time gets it; after that the hypervisor is told."""
    made = roster()
    assert made.spawn(0.0, 1, "domio", "native", 1) == []
    assert made.tick(PLACE_S - 1) == []
    assert made.enrolled(PLACE_S - 1, "domio") == [Give(1, "domio")]
    late = roster()
    late.spawn(0.0, 1, "domio", "native", 1)
    (over,) = late.tick(PLACE_S)
    assert isinstance(over, Over)
    assert late.processes == {}


def test_killed_while_it_waits() -> None:
    """Nothing is begun."""
    made = roster()
    made.spawn(0.0, 1, "domio", "native", 1)
    assert made.signal(0.0, 1, "stop") == []
    (over,) = made.signal(0.0, 1, "kill")
    assert isinstance(over, Over)
    assert made.enrolled(1.0, "domio") == []


def running() -> Roster:
    """DomIO runs."""
    made = roster("domio", "pv", "any")
    made.spawn(0.0, 1, "domio", "native", 1)
    made.running("domio", 1, 7, watched=True)
    return made


def test_the_next_begins_when_the_one_before_is_gone() -> None:
    """One process a container."""
    made = running()
    assert made.spawn(1.0, 2, "domio", "native", 1) == []
    assert made.ended(2.0, "domio", 1, -9, "", dead=True) == [Over(1, -9, ""), Give(2, "domio")]


def test_a_container_that_ends_takes_its_process_with_it_when_the_kernel_says_so() -> None:
    """A broken link is no death: what is frozen with its container may live on, and no other begins before it is dead."""
    made = running()
    made.spawn(1.0, 2, "domio", "native", 1)
    assert made.lost(1.0, "domio") == []
    assert made.enrolled(1.5, "domio") == []
    assert made.tick(1000.0)[:1] == [
        Over(2, 1, f"no container for role domio was free within {PLACE_S:.0f} s")
    ]
    (over,) = made.dead(1001.0, 1)
    assert over == Over(1, -9, "its container ended")
    assert made.spawn(1002.0, 3, "domio", "native", 1) == [Give(3, "domio")]


def test_an_agent_that_does_not_begin_is_dropped() -> None:
    """Within a bound, and its process is over when its container had time to die."""
    made = roster("domio")
    made.spawn(0.0, 1, "domio", "native", 1)
    (drop,) = made.tick(BEGIN_S)
    assert isinstance(drop, Drop)
    made.lost(BEGIN_S, "domio")
    assert made.tick(BEGIN_S + LOST_S / 2) == []
    (over,) = made.tick(BEGIN_S + LOST_S)
    assert isinstance(over, Over)


def test_an_agent_that_does_not_say_how_its_process_ended_is_dropped() -> None:
    """Within a bound: the hypervisor is not left with a process that is dead."""
    made = running()
    assert made.dead(0.0, 1) == []
    assert made.tick(SAY_S - 1) == []
    assert made.tick(SAY_S) == [Drop("domio", "did not say how process 1 ended")]
    made.lost(SAY_S, "domio")
    assert made.dead(SAY_S, 1) == [Over(1, -9, "its container ended")]


def test_signals_go_to_the_agent() -> None:
    """But not to one that is gone."""
    made = running()
    assert made.signal(0.0, 1, "stop") == [Pass(1, "domio", "stop")]
    assert made.signal(0.0, 99, "kill") == []
    made.lost(0.0, "domio")
    assert made.signal(0.0, 1, "kill") == []


def test_lies() -> None:
    """Each is told apart from the truth."""
    made = running()
    made.spawn(0.0, 2, "domu", "pv", 2)
    with pytest.raises(Lie, match="not in this container"):
        made.ended(0.0, "domio", 2, 0, "", dead=True)
    with pytest.raises(Lie, match="not in this container"):
        made.running("domio", 2, 1, watched=True)
    with pytest.raises(Lie, match="began twice"):
        made.running("domio", 1, 1, watched=True)
    with pytest.raises(Lie, match="and lives"):
        made.ended(0.0, "domio", 1, 0, "", dead=False)
    with pytest.raises(Lie, match="enrolled twice"):
        made.enrolled(0.0, "domio")
    with pytest.raises(Lie, match="in use"):
        made.spawn(0.0, 1, "domio", "native", 1)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["running", "ended", "enrolled", "lost"]),
        st.integers(0, 4),
        st.integers(-20, 20),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS)
def test_an_agent_that_lies_changes_nothing_of_others(events: list[tuple[str, int, int, bool]]) -> None:
    """Whatever one agent says of whatever process: those of others run on, and their containers stay theirs."""
    made = roster("domio", "pv", "any")
    made.spawn(0.0, 1, "domio", "native", 1)
    made.spawn(0.0, 2, "domu", "pv", 2)
    made.running("pv", 2, 7, watched=True)
    made.spawn(0.0, 3, "domu", "pv", 3)
    made.running("any", 3, 7, watched=True)
    for what, number, status, flag in events:
        with contextlib.suppress(Lie):
            if what == "running":
                made.running("domio", number, status & 0xFF, watched=flag)
            elif what == "ended":
                for action in made.ended(0.0, "domio", number, status, "", dead=flag):
                    assert isinstance(action, Over)
                    assert action.id == 1
            elif what == "enrolled":
                assert made.enrolled(0.0, "domio") == []
            else:
                made.lost(0.0, "domio")
    for name, number in (("pv", 2), ("any", 3)):
        process = made.agents[name].process
        assert process is not None
        assert (process.id, process.state) == (number, State.RUNNING)
