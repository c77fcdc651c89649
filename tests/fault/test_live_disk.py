"""Faults of a real machine's device, DMA, interrupts, grants and links, under a Debian that writes: what it is told, and that it goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.chaos import ChaosMachine, blank, chaos_machine, written
from tests.support.machines import Expected
from toolstack.faults import What

pytestmark = [pytest.mark.timeout(180), pytest.mark.long]
DISK = "xvdb"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk of all tests."""
    return blank(tmp_path_factory.mktemp("disks") / "disk.img")


@pytest.fixture(scope="module")
def worker(shared_machines: None, image: Path) -> Iterator[ChaosMachine]:
    """One machine for all."""
    with chaos_machine() as machine:
        machine.boot()
        machine.expect("worker", "WORKER", 120.0)
        machine.attach("worker", DISK, image)
        assert machine.does("worker", DISK, "put")
        yield machine


@contextmanager
def fresh(machine: ChaosMachine, directory: Path) -> Iterator[tuple[str, Path]]:
    """A disk of the test's own: a new connection, on which frames are mapped and flushes are sent (after a failed one Linux sends no
    more)."""
    path = blank(directory / "fresh.img")
    machine.attach("worker", "xvdc", path)
    try:
        yield "xvdc", path
    finally:  # or the next test would fail for it
        machine.client.request("block-detach", {"domain": "worker", "vdev": "xvdc"})


def test_a_power_cut_is_told(worker: ChaosMachine, image: Path) -> None:
    """What was answered and not flushed is gone, and the guest is told, once: by the flush, which Linux's blkfront does not hear, and by
    the next write, which it does."""
    assert worker.does("worker", DISK, "put")
    before = written(image)
    assert worker.does("worker", DISK, "raw")
    assert written(image) != before
    worker.faults.wait(worker.faults.add(What.POWER_CUT, target="nvme", at_ms=0, keep="lost"), worker.poll)
    worker.does("worker", DISK, "flush")  # it fails at the back end, which Linux takes for "not supported"
    assert written(image) == before
    assert not worker.does("worker", DISK, "put"), "nobody was told that answered writes are gone"
    assert worker.does("worker", DISK, "put")
    worker.check()


def test_a_power_cut_that_nobody_was_there_to_see(worker: ChaosMachine) -> None:
    """DomIO dies in the same moment: its successor compares the device's count with that in the ledger."""
    assert worker.does("worker", DISK, "put")
    assert worker.does("worker", DISK, "raw")
    worker.faults.wait(worker.faults.add(What.FREEZE, target="dom0", at_ms=0, for_ms=300), worker.poll)
    kill = worker.faults.add(What.KILL, target="domio", at_ms=0)
    cut = worker.faults.add(What.POWER_CUT, target="nvme", at_ms=0, keep="torn", seed=7)
    worker.faults.wait(kill, worker.poll)
    worker.faults.wait(cut, worker.poll)
    worker.does("worker", DISK, "flush")
    assert not worker.does("worker", DISK, "put")
    assert worker.does("worker", DISK, "put")


@pytest.mark.parametrize(
    ("what", "event", "count", "errors"),
    [
        (What.DEVICE_ERROR, "media:write", 1, True),
        (What.WRONG_DMA, "dma", 1, None),
        (What.LOSE, "dma", 3, False),
        (What.SPURIOUS, "dma", 3, False),
        (What.NO_GRANTS, "grant:map", 2, True),
        (What.NO_IOMMU, "grant:map", 2, True),
        (What.DELAY, "grant:unmap", 1, False),
    ],
)
def test_what_the_disk_does_not_do(
    worker: ChaosMachine, tmp_path: Path, what: What, event: str, count: int, errors: bool | None
) -> None:
    """A write under the fault is done, or fails honestly: whether one fails is known (`errors`; None: it depends on what the DMA was
    for), and when all faults have struck the next ones are as always. Of refused maps the first is of the page of indirect descriptors, which is copied instead; the second is of the
    data. Frames stay mapped until the disk goes."""
    target = "nvme" if what is What.DEVICE_ERROR else "domio"
    with fresh(worker, tmp_path) as (vdev, image):
        if event == "dma":  # not those of the controller's own set-up
            assert worker.does("worker", vdev, "put", 90.0)
        elif event == "grant:map":  # not those of the ring, nor of Linux's search for partitions
            assert worker.does("worker", vdev, "flush", 90.0)
        faults = [
            worker.faults.add(what, target=target, event=event, n=n, latency_ms=300)
            for n in range(1, 1 + count)
        ]
        told = [put(worker, vdev, image)]
        while event != "grant:unmap" and len(told) < 2 * count and not all(map(worker.faults.hit, faults)):
            told.append(put(worker, vdev, image))
        assert errors is None or ("FAIL" in told) is errors
        assert put(worker, vdev, image) == "ACK"
        assert put(worker, vdev, image) == "ACK"
    assert [worker.faults.hit(fault) for fault in faults] == [True] * count
    worker.check()


def put(worker: ChaosMachine, vdev: str, image: Path) -> str:
    """Have it write: ACK or FAIL. What it says is written is on the disk at once."""
    tag = worker.put("worker", vdev)
    told = worker.expect("worker", rf"(ACK|FAIL) {tag} ?([0-9a-f]*)", 90.0)
    if told.group(1) == "ACK":
        assert told.group(2) == written(image), "an acknowledged write is not on the disk"
    return told.group(1)


@pytest.mark.parametrize(
    ("what", "target"),
    [
        (What.SILENCE, "domio"),
        (What.CUT, "domio"),
        (What.CUT, "nvme"),
        (What.DELAY, "nvme"),
        (What.BANDWIDTH, "nvme"),
        (What.SLOW, "domio"),
    ],
)
def test_links_that_are_late_silent_or_cut(worker: ChaosMachine, what: What, target: str) -> None:
    """At a DMA request, for 300 ms: the guest sees a pause at most."""
    fault = worker.faults.add(
        what, target=target, event="ring:request", for_ms=300, latency_ms=3, jitter_ms=3, bytes_per_s=500_000
    )
    assert worker.does("worker", DISK, "put", 90.0)
    assert worker.faults.hit(fault)
    assert worker.does("worker", DISK, "put", 90.0)
    worker.check()


@pytest.mark.parametrize("event", ["ledger:record.torn", "step:submitted", "step:published", "media:flush"])
@pytest.mark.parametrize("what", [What.KILL, What.SEGFAULT])
def test_death_at_a_crash_point(worker: ChaosMachine, tmp_path: Path, what: What, event: str) -> None:
    """Of the back end's own crash points on a real process, and of the device in the middle of a flush."""
    target = "nvme" if event.startswith("media") else "domio"
    with fresh(worker, tmp_path) as (vdev, image):
        fault = worker.faults.add(what, target=target, event=event)
        tag = worker.put("worker", vdev)
        told = worker.expect("worker", rf"(ACK|FAIL) {tag} ?([0-9a-f]*)", 60.0)
        assert worker.faults.wait(fault).pids
        assert (told.group(1), told.group(2)) == ("ACK", written(image))
    worker.check()


@pytest.mark.parametrize("event", ["done:domio", "done:domu", "answer:domio", "answer:dom0", "answer:domu"])
@pytest.mark.parametrize("what", [What.DUPLICATE, What.REORDER])
def test_answers_that_come_twice_or_in_another_order(
    worker: ChaosMachine, tmp_path: Path, what: What, event: str
) -> None:
    """Of hypercalls and orders, while a disk comes, is written and goes: the first answer counts, and finds who waits for it."""
    faults = [worker.faults.add(what, event=event, n=n, latency_ms=20) for n in range(1, 9, 2)]
    with fresh(worker, tmp_path) as (vdev, image):
        assert put(worker, vdev, image) == "ACK"
        assert put(worker, vdev, image) == "ACK"
    worker.check()
    assert any(worker.faults.hit(fault) for fault in faults)


@pytest.mark.parametrize("event", ["answer:nvme", "done:nvme"])
def test_answers_of_a_device_and_to_it_that_come_twice(
    worker: ChaosMachine, tmp_path: Path, event: str
) -> None:
    """Of DMA and of register accesses, also while the controller is set up: nothing is done for the second."""
    faults = [worker.faults.add(What.DUPLICATE, event=event, n=n) for n in range(1, 30, 2)]
    with fresh(worker, tmp_path) as (vdev, image):
        assert put(worker, vdev, image) == "ACK"
        assert put(worker, vdev, image) == "ACK"
    worker.check()
    assert any(worker.faults.hit(fault) for fault in faults)


def test_notifications_come_twice_late_or_not_at_all(tmp_path: Path) -> None:
    """With doorbells off they are messages. The block protocol survives the loss of none: the last one is lost, and the guest waits."""
    with chaos_machine(doorbells=False) as machine:
        machine.boot()
        machine.expect("worker", "WORKER", 120.0)
        cells = itertools.product((What.DUPLICATE, What.REORDER), ("notification:domio", "notification:domu"))
        for vdev, (what, event) in zip(("xvdc", "xvdd", "xvde", "xvdf"), cells, strict=True):
            faults = [machine.faults.add(what, event=event, n=n, latency_ms=20) for n in range(1, 9, 2)]
            image = blank(tmp_path / vdev)
            machine.attach("worker", vdev, image)
            assert put(machine, vdev, image) == "ACK"
            assert put(machine, vdev, image) == "ACK"
            assert all(machine.faults.hit(fault) for fault in faults)
        machine.attach("worker", DISK, blank(tmp_path / "last.img"))
        assert machine.does("worker", DISK, "put")
        lost = machine.faults.add(What.LOSE, event="notification:domio", n=1)
        tag = machine.put("worker", DISK)
        machine.faults.wait(lost, machine.poll)
        with pytest.raises(Expected):
            machine.expect("worker", rf"(ACK|FAIL) {tag}", 3.0)
        machine.check()
