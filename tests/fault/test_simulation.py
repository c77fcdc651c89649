"""The simulation: the same seed is the same run, broken copies are found, the product as it is survives."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from simulation.disk import DiskWorld
from simulation.model import DiskModel
from simulation.mutants import MUTANTS, applied
from simulation.network import NetWorld
from simulation.plan import Fault, Plan, PlanError, What, load_plan, parse_plan
from simulation.runner import default_plan, run_seed, shrink
from simulation.world import World

PROGRAM = """
from simulation.runner import run_seed
for seed in (3, 8, 20):
    outcome = run_seed(seed)
    print(seed, outcome.digest, outcome.events, outcome.violations)
"""


def test_the_trace_of_a_seed_is_the_same_in_another_process() -> None:
    """Whatever the hash seed: nothing depends on the order of a set, on the host's clock or on its threads."""
    outputs = []
    for hash_seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].split()[1::4])) == 3


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_broken_copy_is_found_within_its_bound(name: str) -> None:
    """By its scenario's default plan; and the same seed without the defect holds."""
    for seed in range(MUTANTS[name].bound):
        outcome = run_seed(seed, mutant=name)
        if outcome.failed:
            assert not run_seed(seed, default_plan(name)).failed
            # By what it breaks, not because the copy itself does not run.
            assert not re.match(r"\w*(Error|Exception)\b", outcome.violations[0]), outcome.violations
            return
    pytest.fail(f"{name} was not found within {MUTANTS[name].bound} seeds")


def test_a_mutant_leaves_nothing_behind() -> None:
    """The product's methods are back after a run, also after one that raised."""
    before = [run_seed(2).digest]
    for name in MUTANTS:
        with pytest.raises(ZeroDivisionError), applied(name):
            raise ZeroDivisionError
    assert [run_seed(2).digest] == before


def test_the_product_survives_a_fixed_set_of_seeds() -> None:
    """Up to three faults each; and in all of them together most faults do happen."""
    fired = 0
    for seed in range(60):
        outcome = run_seed(seed)
        assert outcome.violations == [], f"seed {seed}: {outcome.plan.toml()}"
        fired += outcome.fired
    assert fired > 40


def test_errors_after_a_power_cut_are_one_flush_and_one_write() -> None:
    """The oracle's allowance is used up: a second failure of a kind needs a second cut."""
    world = DiskWorld(1, Plan())
    assert not world.excused("flush")
    world.machine.power_cut()
    assert [world.excused(what) for what in ("flush", "flush", "write", "write", "read")] == [
        True, False, True, False, False,
    ]  # fmt: skip
    world.machine.power_cut()
    assert [world.excused(what) for what in ("write", "write")] == [True, False]


@pytest.mark.parametrize("seed", [0, 1, 3, 5, 10, 11, 12])
def test_who_dies_as_it_tells_of_a_power_cut_has_told_it_once(seed: int) -> None:
    """The failure was in the ledger, and that it had been told was not: the successor told it a second time."""
    cut = Fault(what=What.POWER_CUT, event="dma", n=20 + seed)
    kill = Fault(what=What.KILL, target="domio", event="ledger:completed", n=8 + seed)
    outcome = run_seed(seed, Plan(fault=(cut, kill)))
    assert outcome.fired == 2
    assert outcome.violations == []


def test_a_successor_answers_the_flush_that_failed_before_those_that_did_not() -> None:
    """It answered in the order of the ledger's slots: a flush was done, and the one before it, which told of lost writes, came later."""
    faults = (
        Fault(what=What.POWER_CUT, event="dma", n=23),
        Fault(what=What.KILL, target="domio", event="ledger:answer", n=19),
    )
    outcome = run_seed(90, Plan(fault=faults))
    assert outcome.fired == 2
    assert outcome.violations == []


def test_a_device_that_is_reset_while_the_disk_is_offered_comes_up() -> None:
    """Seed 6553 of the second campaign, shrunk: the driver was STARTING for ever (tests/unit/block/test_nvme_driver.py)."""
    faults = (
        Fault(what=What.KILL, event="ledger:completed", n=3),
        Fault(what=What.FREEZE, event="ring:request", n=5, for_ms=200.0),
        Fault(what=What.KILL, target="device", event="dma", n=30),
    )
    outcome = run_seed(6553, Plan(fault=faults, operations=6))
    assert outcome.fired == 3
    assert outcome.violations == []
    assert outcome.events < 5000


@pytest.mark.parametrize("seed", [5221, 6534])
def test_flushes_beside_a_power_cut_are_judged_by_what_the_guest_knows(seed: int) -> None:
    """A write that was answered with an error may be undone by a second cut; of two queues' flushes that are answered at once, the guest may
    see the good one first. The product was right, the oracle was not."""
    outcome = run_seed(seed)
    assert outcome.fired >= 1
    assert outcome.violations == []


def test_a_flush_that_hides_what_a_power_cut_undid_is_wrong() -> None:
    """The oracle still sees it, and not for a write that was answered with an error."""
    for fine in (True, False):
        model = DiskModel(8)
        model.write(3, b"x" * 512)
        model.written(3, b"x" * 512, fine)
        model.power_cut([3])
        assert (model.flushed(model.flush(), True) is not None) == fine


@pytest.mark.parametrize("scenario", [DiskWorld, NetWorld])
def test_a_world_that_is_begun_anew_is_as_a_new_one(scenario: type[World]) -> None:
    """Whatever a run before did to it: its guest is destroyed, here, with all that it had."""
    for seed in (3, 8):  # 8: messages are encoded
        plan = Plan(random_faults=3, scenario="network" if scenario is NetWorld else "disk")
        fresh = scenario(seed, plan).run()
        end = Fault(what=What.KILL, target="guest", event="ring:request", n=3)
        assert run_seed(seed, Plan(fault=(end,), scenario=plan.scenario)).fired == 1
        assert run_seed(seed, plan) == fresh


def test_a_trace_that_is_kept_is_the_same_trace() -> None:
    """What is in it only for a reader has no part in its digest."""
    kept = run_seed(4, keep_trace=True)
    assert kept.trace
    assert kept.digest == run_seed(4).digest


@pytest.mark.parametrize(
    ("end", "state"),
    [("front", state) for state in (1, 3, 4, 5, 6)] + [("back", state) for state in (1, 2, 4, 5, 6)],
)
def test_the_driver_domain_may_die_at_each_xenbus_state(end: str, state: int) -> None:
    """Each state that an end passes through (a front end skips InitWait, a back end Initialised; nobody reconfigures here):
    nothing that was acknowledged is lost, and nobody hangs."""
    fault = Fault(what=What.KILL, target="domio", event=f"xenbus:{end}:{state}")
    outcome = run_seed(5, Plan(fault=(fault,), operations=8))
    assert outcome.fired == 1
    assert outcome.violations == []


def test_a_lost_notification_hangs_the_guest_and_is_seen() -> None:
    """The oracle sees a hang: the block protocol tolerates no lost doorbell."""
    faults = tuple(Fault(what=What.LOSE, event="notify:front", n=n) for n in range(3, 40))
    outcome = DiskWorld(1, Plan(fault=faults)).run()
    assert outcome.fired
    assert any("hang" in text for text in outcome.violations)


def test_a_device_that_goes_astray_moves_nothing() -> None:
    """DMA to a frame it was never given faults in the IOMMU: the request fails, the guest's memory does not change, all closes."""
    outcome = run_seed(4, Plan(fault=(Fault(what=What.WRONG_DMA, event="dma", n=30),)))
    assert outcome.violations == []
    assert outcome.fired == 1


def test_a_completion_that_went_astray_costs_a_reset_and_no_more() -> None:
    """The completion entry's own DMA faults: the command times out, the controller is reset, I/O goes on."""
    fault = Fault(what=What.WRONG_DMA, event="dma", n=15)
    outcome = run_seed(5, Plan(fault=(fault,)))
    assert outcome.fired == 1
    assert outcome.violations == []


def test_a_frozen_granter_and_a_dead_driver_domain_leave_no_grant_in_use() -> None:
    """Seed 2839 of the first campaign, shrunk: the answer to a map that the dead process had asked for came to its successor, which
    waited for another map under the same token."""
    kill = Fault(what=What.KILL, target="domio", at_ms=8.818)
    freeze = Fault(what=What.FREEZE, target="guest", event="ring:request", n=3, for_ms=200.0)
    outcome = run_seed(2839, Plan(fault=(kill, freeze), operations=3))
    assert outcome.fired == 2
    assert outcome.violations == []


def test_a_read_after_a_thaw_and_a_restart_succeeds() -> None:
    """Seed 1324 of the first campaign: the same defect, seen as a read that failed."""
    kill = Fault(what=What.KILL, target="domio", at_ms=29.21)
    freeze = Fault(what=What.FREEZE, target="guest", event="ring:request", n=11, for_ms=200.0)
    outcome = run_seed(1324, Plan(fault=(kill, freeze)))
    assert outcome.fired == 2
    assert outcome.violations == []


def test_a_guest_that_dies_with_requests_under_way_leaves_nothing() -> None:
    """Its frames come back when the back end has let go of them."""
    for seed in range(12):
        fault = Fault(what=What.KILL, target="guest", event="ring:request", n=8)
        outcome = run_seed(seed, Plan(fault=(fault,)))
        assert outcome.fired == 1
        assert outcome.violations == []


def test_a_failing_plan_shrinks_to_what_matters() -> None:
    """Faults that have no part in the failure go, operations too; the smaller plan fails from the same seed."""
    noise = Fault(what=What.DUPLICATE, event="notify:back", n=2)
    jump = Fault(what=What.CLOCK_JUMP, event="ring:request", n=3, for_ms=10.0)
    kill = Fault(what=What.KILL, event="step:published", n=4)
    outcome = run_seed(2, Plan(fault=(noise, kill, jump)), mutant="silent-resume")
    assert outcome.failed
    small = shrink(outcome, mutant="silent-resume")
    assert small.plan.fault == (kill,)
    assert small.plan.operations < 24
    assert run_seed(2, parse_plan(small.plan.toml()), mutant="silent-resume").failed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fault = [", "p: not TOML"),
        ("faults = []", "p: faults: Extra inputs are not permitted"),
        ('[[fault]]\nwhat = "explode"\nat_ms = 1', "p: fault[1].what: Input should be 'kill'"),
        ('[[fault]]\nwhat = "kill"', "p: fault[1]: give either event (with n) or at_ms"),
        ('[[fault]]\nwhat = "lose"\nevent = "dma"', "p: fault[1]: lose needs event = one of notify:front"),
        (
            '[[fault]]\nwhat = "kill"\nevent = "tea-time"',
            "p: fault[1]: event 'tea-time': no event is named so",
        ),
        (
            '[[fault]]\nwhat = "no-memory"\nevent = "hypercall:make_tea"',
            "p: fault[1]: event 'hypercall:make_tea': no event is named so",
        ),
        ('[[fault]]\nwhat = "kill"\nevent = "xenbus:back:9"', "p: fault[1]: event 'xenbus:back:9': no event"),
        (
            '[[fault]]\nwhat = "segfault"\nat_ms = 1',
            "p: fault[1].what: segfault is not simulated, it is for machines of real processes",
        ),
        (
            '[[fault]]\nwhat = "kill"\nevent = "dma"\nn = 0',
            "p: fault[1].n: Input should be greater than or equal to 1",
        ),
        ("operations = 0", "p: operations: Input should be greater than or equal to 1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_in_one_line(text: str, told: str) -> None:
    """The line names the place."""
    with pytest.raises(PlanError) as caught:
        parse_plan(text, "p")
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", list(What))
def test_every_fault_that_a_plan_may_name_is_carried_out(what: What) -> None:
    """None is accepted and then not known: each strikes, and changes the run."""
    where: dict[What, dict[str, object]] = {
        What.LOSE: {"event": "interrupt"}, What.DUPLICATE: {"event": "notify:back"}, What.DELAY: {"event": "notify:back"},
        What.REORDER: {"event": "answer:domio", "n": 3},
        What.NO_MEMORY: {"event": "hypercall:gnttabop_map_grant_ref"}, What.NO_PORTS: {"event": "hypercall:evtchnop_bind_interdomain"},
        What.NO_GRANTS: {"event": "grant:map"}, What.WRONG_DMA: {"event": "dma", "n": 20},
    }  # fmt: skip
    fault = Fault.model_validate({"what": what, **where.get(what, {"event": "ring:request", "n": 3})})
    outcome = run_seed(6, Plan(fault=(fault,), operations=8))
    assert outcome.fired == 1
    assert outcome.violations == []
    assert outcome.digest != run_seed(6, Plan(operations=8)).digest


def test_a_plan_file_that_is_not_there_is_one_line(tmp_path: object) -> None:
    """With its name."""
    from pathlib import Path

    missing = Path(str(tmp_path)) / "none.toml"
    with pytest.raises(PlanError, match=r"none\.toml: No such file"):
        load_plan(missing)


def test_a_plan_written_out_is_the_plan_read_back() -> None:
    """Of drawn faults too."""
    for seed in range(30):
        plan = DiskWorld(seed, Plan(random_faults=5)).plan
        assert parse_plan(plan.toml()) == plan
