"""Deadlines, deaths and lies: nobody waits for ever, nothing stays referenced, frames come home."""

from __future__ import annotations

import pytest

from bus.abi.grant_table import GNTMAP_device_map, GNTST_eagain
from bus.addresses import DomId
from bus.messages.domain import Order as Message
from bus.messages.envelope import encode
from hypervisor.core import grant_core
from tests.unit.grants.grants_world import HOST, RO, Dom, Process, World

ONE, TWO = DomId(1), DomId(2)


def test_a_granter_that_does_not_answer_fails_the_map_after_a_second() -> None:
    """GNTST_general_error at the deadline; others' maps are refused at once while it is silent; when it comes back it
    undoes what it did late, and all is as before."""
    w = World("pv", "pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    w.grant(2, 9, 3, 3)
    w.process(TWO).page(mfn)[:4] = b"data"
    answers = w.start_map(1, (2, 8, HOST, 0x1000))
    w.pump(2)
    assert answers == []
    waiting = w.start_map(3, (2, 9, HOST, 0x1000))
    w.wait(1.1, 2)
    assert answers[0].status == -1
    assert waiting[0].status == -1
    assert w.start_map(3, (2, 9, HOST, 0x1000))[0].status == -1
    assert TWO not in w.crashed
    w.pump()  # it wakes up: carries out the late map, then its undoing
    assert w.process(TWO).page(mfn)[:4] == b"data"
    assert w.process(TWO).views == {}
    w.clean()
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    assert answer.status == 0
    w.unmap(1, (answer.handle, 0x1000, 0))
    w.clean()


def slow_maps(w: World, seconds: float, count: int, *, mapper: int = 1) -> list[int]:
    """Statuses of so many maps and unmaps for a device, each of whose orders takes the granter, domain 2, so long."""
    statuses = []
    for _ in range(count):
        answers = w.start_map(mapper, (2, 8, GNTMAP_device_map, 0x1000))
        w.pump(2)
        if not answers:
            w.wait(seconds)
        statuses.append(answers[0].status)
        if answers[0].status == 0:
            unmap = w.start_unmap(mapper, (answers[0].handle, 0, answers[0].dev_bus_addr))
            w.pump(2)
            w.wait(seconds)
            assert unmap[0].status == 0
    return statuses


def test_a_granter_that_takes_just_under_a_second_each_time_is_put_off_soon() -> None:
    """Whoever maps its frames serves others, and waits a fifth of the time for it at most; others' frames, and what is mapped already, are
    not concerned."""
    w = World("pv", "pv", "pv")
    w.grant(2, 8, 1, 3)
    w.grant(2, 9, 1, 4)
    w.grant(3, 8, 1, 3)
    (kept,) = w.map(1, (2, 9, GNTMAP_device_map, 0x9000))
    assert slow_maps(w, 0.95, 7)[4:] == [GNTST_eagain] * 3, "eight of its seconds were waited for"
    (again,) = w.map(1, (2, 9, GNTMAP_device_map, 0x8000))
    (other,) = w.map(1, (3, 8, GNTMAP_device_map, 0x7000))
    assert (again.status, other.status) == (0, 0)
    assert sum("put off" in e.text for e in w.logged) == 1
    waited, began = 0, w.now
    while w.now - began < 1000 * 10**9:
        before = w.now
        assert slow_maps(w, 0.95, 1)[0] in (0, GNTST_eagain)
        waited += w.now - before
        w.wait(0.1)
    assert 0.1 < waited / (w.now - began) < 0.25
    w.wait(60)
    assert slow_maps(w, 0.005, 1000) == [0] * 1000, "it has become quick, and each is served"
    for mapping in (kept, again, other):
        w.unmap(1, (mapping.handle, 0, mapping.dev_bus_addr))
    w.clean()
    assert TWO not in w.crashed


def test_a_granter_on_a_busy_host_is_served_on() -> None:
    """Answers within twenty milliseconds cost nothing, however many; slower ones now and then, neither."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    assert slow_maps(w, 0.019, 5000) == [0] * 5000
    for _ in range(50):
        assert slow_maps(w, 0.4, 1) == [0]
        w.wait(4.0)
    w.clean()


def test_a_granter_that_never_answers_is_crashed_in_the_end() -> None:
    """The undoing of a map has a bound as well."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    w.start_map(1, (2, 8, HOST, 0x1000))
    w.wait(1.1, 2)
    assert TWO not in w.crashed
    w.wait(61, 2)
    assert TWO in w.crashed
    w.clean()


def test_a_granter_that_does_not_answer_an_unmap_is_crashed() -> None:
    """The mapper has its answer within a second and nothing keeps the frame."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    unmap = w.start_unmap(1, (answer.handle, 0x1000, 0))
    w.pump(2)
    assert unmap == []
    w.wait(1.1, 2)
    assert unmap[0].status == 0
    assert TWO in w.crashed
    w.clean()


def test_an_unmap_behind_a_map_that_missed_its_deadline_does_not_wait_for_it() -> None:
    """The granter had its second: it is crashed, and the unmap ends."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3, readonly=False)
    (answer,) = w.map(1, (2, 8, RO, 0x1000))
    late = w.start_map(1, (2, 8, HOST, 0x2000))
    unmap = w.start_unmap(1, (answer.handle, 0x1000, 0))
    w.wait(1.1, 2)
    assert late[0].status == -1
    w.pump(2)
    assert unmap[0].status == 0
    assert TWO in w.crashed
    w.clean()


def test_a_mapper_that_does_not_let_go_is_not_waited_for() -> None:
    """Revocation needs the granter only; the mapper's kept view shows the old bytes for ever."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    unmap = w.start_unmap(1, (answer.handle, 0x1000, 0))
    w.wait(1.1, 1)
    w.pump(1)
    assert unmap[0].status == 0
    w.process(TWO).page(mfn)[:6] = b"secret"
    assert w.process(ONE).foreign(mfn)[:6] != b"secret"
    w.clean()


@pytest.mark.parametrize("steps", range(5))
def test_the_grantee_dies_at_any_step(steps: int) -> None:
    """Wherever the map was, all maps are undone and the granter's flags are clear."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    w.grant(2, 9, 1, 4)
    w.map(1, (2, 9, HOST, 0x8000))
    w.start_map(1, (2, 8, HOST, 0x1000))
    for number in range(steps):
        w.step(DomId(2 - number % 2))
    w.destroy(ONE)
    w.pump()
    assert (w.flags(2, 8), w.flags(2, 9)) == (0, 0)
    assert w.process(TWO).views == {}
    assert w.memory.page(mfn) is w.process(TWO).page(mfn)
    w.clean()
    assert w.grants.quiet(ONE)
    w.grants.remove(ONE)


@pytest.mark.parametrize("steps", range(4))
def test_the_granter_dies_at_any_step(steps: int) -> None:
    """Its frames stay, dying, while mapped; the mapper keeps what it maps; after the unmap all is free."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    w.process(TWO).page(w.doms[TWO].ram[3])[:4] = b"left"
    answers = w.start_map(1, (2, 8, HOST, 0x1000))
    for number in range(steps):
        w.step(DomId(2 - number % 2))
    w.destroy(TWO)
    w.pump()
    if answers[0].status == 0:
        assert w.frames.references(w.doms[TWO].ram[3]) == 1
        assert w.process(ONE).foreign(w.doms[TWO].ram[3])[:4] == b"left"
        assert w.unmap(1, (answers[0].handle, 0x1000, 0)) == [0]
    w.clean()
    assert w.frames.extent_of(TWO) is None
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1


def test_a_granters_process_that_starts_anew_keeps_the_mapping() -> None:
    """Only the process died: the hypervisor knows where the frame is and tells; unmapping works without a process."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    w.process(ONE).foreign(mfn)[:4] = b"kept"
    w.end_process(TWO)
    (own,) = w.grants.own_windows(TWO)
    assert (own.mfn, own.index) == (mfn, 0)
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    assert w.memory.read(mfn, 0, 4) == b"kept"
    assert w.memory.read(w.table(TWO).shared[0], 64, 1) == b"\x01"
    w.clean()


def test_a_granter_without_a_process_can_be_mapped() -> None:
    """A domain whose process is not there (between two lives): the hypervisor sets the bits and moves the frame."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    w.process(TWO).page(mfn)[:4] = b"data"
    w.end_process(TWO)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    assert answer.status == 0
    assert w.process(ONE).foreign(mfn)[:4] == b"data"
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    w.clean()


def test_a_mapper_that_is_restarted_loses_what_was_under_way() -> None:
    """release_mappings on a domain that lives on: complete maps go, a map on its way does not come about."""
    w = World("native", "pv")
    w.dma.tables[1] = {}
    w.grant(2, 8, 1, 3)
    w.grant(2, 9, 1, 4)
    w.map(1, (2, 8, GNTMAP_device_map, 0x70000))
    answers = w.start_map(1, (2, 9, GNTMAP_device_map, 0x71000))
    w.grants.release_mappings(0, ONE)
    assert w.dma.tables[1] == {}
    w.pump()
    assert answers[0].status == -1
    assert w.dma.tables[1] == {}
    w.clean()


def test_nonsense_from_the_granter_is_no_answer() -> None:
    """A process that answers a map with rubbish is asked to undo it; one that refuses an unmap is crashed."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    process = w.process(TWO)
    process.grant_map = lambda body: [0]  # two results are due
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1
    w.clean()
    process.grant_map = lambda body: [7, 7]  # positive results are errors
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1
    w.clean()
    del process.grant_map
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    process.grant_unmap = lambda body: [-1, -1]
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    assert TWO in w.crashed
    w.clean()


def test_a_frame_given_back_while_mapped_stays_until_the_unmap() -> None:
    """Ballooning out a granted frame frees it at the last unmap and not before; it cannot be mapped anew."""
    w = World("pv", "pv")
    mfn = w.grant(2, 8, 1, 3)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    assert w.frames.release(mfn) is False
    assert w.map(1, (2, 8, HOST, 0x2000))[0].status == -1
    w.process(ONE).foreign(mfn)[:4] = b"mine"
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    assert w.frames.owner(mfn) is None
    assert w.frames.kind(mfn) == 0
    w.clean()


def test_a_grantee_is_forgotten_before_its_maps_are_home() -> None:
    """The granter has its second; meanwhile the grantee's id may be used again, and the new domain gets nothing of
    the old one's."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    w.map(1, (2, 8, HOST, 0x1000))
    w.start_map(1, (2, 8, RO, 0x2000))
    w.step(TWO)
    w.doms[ONE].dying = True
    w.grants.release_mappings(0, ONE)
    w.end_process(ONE)
    w.frames.release_domain(ONE)
    w.grants.remove(ONE)
    assert w.grants.check() == []
    del w.doms[ONE]
    assert w.grants.busy
    w.grants.create(ONE)
    w.doms[ONE] = Dom(process=Process(w, ONE))
    again = w.start_map(1, (2, 8, HOST, 0x1000))
    w.pump()
    assert again[0].status == 0  # by the entry, which is the guest's to withdraw
    assert w.unmap(1, (again[0].handle, 0x1000, 0)) == [0]
    w.clean()


def test_domains_that_mapped_each_other_die_together() -> None:
    """Neither waits for the other's last frame."""
    w = World("pv", "pv")
    w.grant(1, 8, 2, 3)
    w.grant(2, 8, 1, 3)
    w.map(1, (2, 8, HOST, 0x1000))
    w.map(2, (1, 8, HOST, 0x1000))
    for domain in (ONE, TWO):
        w.doms[domain].dying = True
        w.end_process(domain)
    for domain in (ONE, TWO):
        w.grants.release_mappings(0, domain)
    for domain in (ONE, TWO):
        w.frames.release_domain(domain)
        w.grants.remove(domain)
    w.clean()
    assert w.frames.free_pages == w.frames.total_pages


def test_no_order_goes_to_a_process_that_is_gone() -> None:
    """An unmap that waited behind another when its caller's process ended goes on without asking it to let go."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)
    (first,), (second,) = w.map(1, (2, 8, HOST, 0x1000)), w.map(1, (2, 8, HOST, 0x2000))
    w.start_unmap(1, (first.handle, 0x1000, 0))
    w.start_unmap(1, (second.handle, 0x2000, 0))
    w.end_process(ONE)
    w.pump()
    w.clean()


def test_a_frame_with_thousands_of_entries_comes_home_in_messages_that_can_be_sent() -> None:
    """A frame may be granted by as many entries as the table has. Those that were mapped through its window are all cleared when it
    leaves it: in several orders, each of which a message can carry (64 KiB, 4096 items in a list)."""
    w = World("pv", "pv", maptrack=32768)
    w.setup(2, 12)
    refs = range(8, 6000)
    for ref in refs:
        w.grant(2, ref, 1, 3)
    (kept,) = w.map(1, (2, 8, HOST, 0x1000))
    for start in range(9, 6000, 500):
        answers = w.map(1, *((2, ref, HOST, 0x1000 * ref) for ref in range(start, min(start + 500, 6000))))
        assert {answer.status for answer in answers} == {0}
        statuses = w.unmap(1, *((answer.handle, answer.host_addr, 0) for answer in answers))
        assert set(statuses) == {0}
    w.orders.clear()
    assert w.unmap(1, (kept.handle, 0x1000, 0)) == [0]
    assert TWO not in w.crashed
    assert all(w.flags(2, ref) == 0 for ref in refs)
    for order in w.orders:
        encode(Message(order=order.order_id, what=order.kind, body=order.body))
        assert all(len(value) <= 4096 for value in order.body.values() if isinstance(value, list))
    w.clean()


def test_windows_of_a_granter_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a descriptor of the hypervisor's. One more map fails, nothing else does, and when some are closed there is room again."""
    monkeypatch.setattr(grant_core, "WINDOWS_OF_A_GRANTER", 4)
    w = World("pv", "pv", "pv")
    for ref in range(8, 16):
        w.grant(2, ref, 1, ref - 6)
        w.grant(3, ref, 1, ref - 6)
    answers = [w.map(1, (2, ref, HOST, 0x1000 * ref))[0] for ref in range(8, 16)]
    good = [answer for answer in answers if answer.status == 0]
    assert 3 <= len(good) <= 4
    assert {answer.status for answer in answers} == {0, -1}
    (other,) = w.map(1, (3, 8, HOST, 0x100000))
    assert other.status == 0
    assert w.unmap(1, *((answer.handle, answer.host_addr, 0) for answer in good)) == [0] * len(good)
    (again,) = w.map(1, (2, 15, HOST, 0x200000))
    assert again.status == 0
    assert w.unmap(1, (other.handle, 0x100000, 0), (again.handle, 0x200000, 0)) == [0, 0]
    w.clean()


def test_a_window_that_cannot_be_made_fails_its_map_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hypervisor has no descriptor left, or no memory."""
    w = World("pv", "pv")
    for ref in (8, 9):
        w.grant(2, ref, 1, ref - 6)
    make = w.memory.create_window

    def none_left(window: int, frames: int) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(w.memory, "create_window", none_left)
    assert w.map(1, (2, 8, HOST, 0x1000))[0].status == -1
    w.clean()
    monkeypatch.setattr(w.memory, "create_window", make)
    (answer,) = w.map(1, (2, 8, HOST, 0x1000))
    assert answer.status == 0
    assert w.unmap(1, (answer.handle, 0x1000, 0)) == [0]
    w.clean()


def test_a_job_that_fails_gives_its_locks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the hypervisor's in the middle of a map is told to whoever called; others' maps of the frame do not wait for ever."""
    w = World("pv", "pv")
    w.grant(2, 8, 1, 3)

    def broken(mapper: DomId) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(w, "has_process", broken)
    with pytest.raises(ZeroDivisionError):
        w.start_map(1, (2, 8, HOST, 0x1000))
    monkeypatch.undo()
    assert w.grants.busy == 0
    assert not w.grants.moving(w.doms[TWO].ram[3])
