"""The timeline: what the format wants holds for any records, flows go through all that take part, memory is bounded."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.trace import FIELDS, NOBODY, Kind, Purpose, Record
from tests.support.trace_format import problems
from toolstack.trace import timeline as module
from toolstack.trace.session import DEVICE, HYPERVISOR, Entry, Peer
from toolstack.trace.timeline import Timeline

XEN, DOMIO = Peer(HYPERVISOR, "hypervisor", "hypervisor"), Peer(2, "domio", "")
GUEST, NVME = Peer(5, "domu", ""), Peer(DEVICE | 8, "nvme", "disk1")
NAMES = {2: "DomIO", 5: "web"}


def written(entries: list[Entry]) -> dict[str, Any]:
    out = io.StringIO()
    timeline = Timeline(out, 0, dict(NAMES))
    timeline.feed(entries)
    timeline.close()
    trace: dict[str, Any] = json.loads(out.getvalue())
    return trace


def entry(time: int, peer: Peer, kind: Kind, track: int, subject: int, *values: int) -> Entry:
    return Entry(peer, Record(time, kind, track, subject, (*values, *[0] * (6 - len(values)))))


def story() -> list[Entry]:
    """One read of a guest's: notification, ring, command, DMA, answer, event."""
    return [
        entry(1_000, GUEST, Kind.RUN, 0, 0, 9_000),
        entry(2_000, GUEST, Kind.CALL, 0, 0, 32, 4, 3_000, 0),
        entry(3_000, GUEST, Kind.SEND, 0, 0, 11),
        entry(20_000, DOMIO, Kind.KICKED, 0, 5, 51712, 11, 7, 0),
        entry(21_000, DOMIO, Kind.TAKEN, 0, 5, 51712, 0, 99, 0, 2048, 8),
        entry(22_000, XEN, Kind.GRANT, 5, 2, 0, 31, 1, 0x2_0000_0000, 0),
        entry(23_000, DOMIO, Kind.COMMAND, 0, 5, 51712, 0, 40, 8, 0),
        entry(24_000, DOMIO, Kind.SUBMIT, 1, 8, 3, 40, 2, 2048, 8, 0),
        entry(30_000, NVME, Kind.FETCHED, 1, 0, 3, 2, 0x2_0000_0000, 0, 2048, 8),
        entry(31_000, NVME, Kind.MEDIUM, 1, 0, 0, 2048 * 512, 4096, 2_500),
        entry(35_000, NVME, Kind.REQUEST, 1, 0, 77, 1, 0x2_0000_0000, 4096, 3, Purpose.DATA),
        entry(36_000, XEN, Kind.DMA, 2, 8, 77, 1, 0x2_0000_0000, 4096, 0xABC000, 5),
        entry(37_000, XEN, Kind.INTERRUPT, 2, 8, 0, 2, 16),
        entry(38_000, NVME, Kind.POSTED, 1, 0, 3, 0),
        entry(40_000, DOMIO, Kind.ANSWERED, 0, 5, 51712, 0, 0),
        entry(50_000, GUEST, Kind.RECEIVE, 0, 0, 11),
        entry(51_000, XEN, Kind.DMA, 2, 8, 78, 1, 0x3_0000_0000, 4096, 0, 5 << 16 | NOBODY),
        entry(52_000, XEN, Kind.LEASE, 0, 5, 1, 0),
        entry(60_000, XEN, Kind.LEASE, 0, 5, 0, 0),
    ]


def test_a_request_is_a_flow_through_all_that_take_part() -> None:
    trace = written(story())
    assert problems(trace) == []
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    path = [
        (e["ph"], processes[e["pid"]], threads[e["pid"], e["tid"]], e["ts"])
        for e in events
        if e["ph"] in "stf"
    ]
    ring = "xvda of d5 web ring 0"
    assert path == [
        ("s", "d5 web", "vCPU 0", 3.0),
        ("t", "d2 DomIO", ring, 21.0),
        ("t", "d2 DomIO", ring, 24.0),
        ("t", "NVMe 0000:00:01.0 (disk1)", "queue 1", 30.0),
        ("t", "hypervisor", "IOMMU", 36.0),
        ("t", "d2 DomIO", ring, 40.0),
        ("f", "d5 web", "vCPU 0", 50.0),
    ]
    names = [e["name"] for e in events if e["ph"] == "X"]
    assert "map d5 ref 0x1f" in names
    assert "FAULT no right to write there" in names
    lease = next(e for e in events if e["ph"] == "X" and threads[e["pid"], e["tid"]] == "CPU 0 leases")
    assert (lease["name"], lease["ts"], lease["dur"]) == ("d5 web", 52.0, 8.0)
    span = [e for e in events if e.get("cat") == "request" and e["ph"] in "be"]
    assert [(e["ph"], e["name"], e["ts"]) for e in span] == [
        ("b", "READ 8 at 2048", 21.0),
        ("e", "READ 8 at 2048", 40.0),
    ]


def test_a_request_whose_frontend_did_not_notify_and_is_never_answered_is_whole_all_the_same() -> None:
    trace = written(
        [each for each in story() if each.record.kind not in (Kind.SEND, Kind.ANSWERED, Kind.RECEIVE)]
    )
    assert problems(trace) == []
    events = trace["traceEvents"]
    assert [e["ph"] for e in events if e.get("cat") == "request" and e["ph"] in "be"] == ["b", "e"]


SIMPLE = [Kind.EVENT, Kind.GRANT, Kind.INTERRUPT, Kind.DMA, Kind.LEASE, Kind.SEND, Kind.RECEIVE, Kind.REQUEST]
LATER = [
    *SIMPLE,
    *(kind for kind in FIELDS if kind not in (*SIMPLE, Kind.RUN, Kind.CALL, Kind.HYPERCALL, Kind.MEDIUM)),
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([XEN, DOMIO, GUEST, NVME]),
            st.sampled_from(LATER),
            st.integers(0, 3),
            st.sampled_from([0, 2, 5, 8]),
            st.lists(st.one_of(st.integers(0, 3), st.integers(0, (1 << 64) - 1)), min_size=6, max_size=6),
        ),
        max_size=60,
    )
)
def test_whatever_processes_write_the_file_is_one(
    records: list[tuple[Peer, Kind, int, int, list[int]]],
) -> None:
    """Numbers that make no sense, beginnings and ends that are missing: it parses, and slices, flows and spans are whole."""
    entries = [
        Entry(peer, Record(1000 * (place + 1), kind, track, subject, tuple(values)))
        for place, (peer, kind, track, subject, values) in enumerate(records)
    ]
    assert problems(written(entries)) == []


def test_what_writers_may_choose_anew_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that are never posted, ports, rings and answers that nobody hears of: the oldest go, and the file is whole."""
    monkeypatch.setattr(module, "MAX_OPEN", 16)
    out = io.StringIO()
    timeline = Timeline(out, 0, dict(NAMES))
    for turn in range(200):
        at = 100_000 * turn
        timeline.feed(
            [
                entry(at + 1000, NVME, Kind.FETCHED, 1, 0, turn, 2, 0, 0, 0, 8),
                entry(at + 2000, GUEST, Kind.SEND, 0, 0, turn),
                entry(at + 3000, DOMIO, Kind.KICKED, 0, 5, 51712 + 16 * turn, turn, 7, 0),
                entry(at + 4000, DOMIO, Kind.TAKEN, 0, 5, 51712 + 16 * turn, 0, 99, 0, 2048, 8),
                entry(at + 5000, DOMIO, Kind.ANSWERED, 0, 5, 51712 + 16 * turn, 0, 0),
            ]
        )
    tables = (timeline._spans, timeline._sent, timeline._ports, timeline._tids)
    assert [len(table) for table in tables] == [16, 16, 16, 16]
    assert sum(map(len, timeline._answers.values())) == timeline._waiting <= 16
    timeline.close()
    trace = json.loads(out.getvalue())
    assert [text for text in problems(trace) if "has no name" not in text] == []
    spans = [e["ph"] for e in trace["traceEvents"] if e.get("cat") == "command"]
    assert (spans.count("b"), spans.count("e")) == (200, 200)
