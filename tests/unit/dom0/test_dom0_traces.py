"""Trace pages in Dom0: those of guests that lived shorter than a watcher's look are still handed out, and not for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus.trace_page import Page
from domains.dom0.toolstack.traces import BATCH, PAST, Traces


class Machine:
    """Dom0's end; the test is the hypervisor."""

    def __init__(self) -> None:
        link = SimpleNamespace(next_token=lambda: 1, exchange=lambda message, token: (0, b""))
        self.host = cast(Any, SimpleNamespace(on_order={}, link=link))
        self.traces = Traces(self.host)
        self.pages: list[Page] = []

    def comes(self, peer: int) -> None:
        page = Page("test")
        self.pages.append(page)
        order = SimpleNamespace(body={"peer": peer, "role": "domu", "name": ""})
        self.host.on_order["trace_page"](order, [os.dup(page.fd)])

    def goes(self, peer: int) -> None:
        self.host.on_order["trace_page_gone"](SimpleNamespace(body={"peer": peer}), [])

    def shown(self, known: list[int]) -> list[tuple[int, int]]:
        rows, fds = self.traces.fresh(known)
        for fd in fds:
            os.close(fd)
        return [(row["id"], row["peer"]) for row in rows]


@pytest.fixture
def machine() -> Iterator[Machine]:
    before = len(os.listdir("/proc/self/fd"))
    made = Machine()
    yield made
    for page in made.pages:
        page.close()
    assert len(os.listdir("/proc/self/fd")) == before, "a page's descriptor stayed open"


def test_a_guest_that_is_gone_before_the_next_look_is_shown(machine: Machine) -> None:
    machine.traces.watch(1, True)
    machine.comes(3)
    machine.goes(3)
    machine.comes(4)
    assert machine.shown([]) == [(1, 3), (2, 4)]
    assert machine.shown([1, 2]) == []
    machine.goes(4)
    machine.traces.watch(1, False)
    assert machine.shown([]) == []


def test_without_a_watcher_nothing_is_kept(machine: Machine) -> None:
    machine.comes(3)
    machine.goes(3)
    assert machine.shown([]) == []
    machine.comes(4)
    machine.comes(4)  # its process began anew
    assert machine.shown([]) == [(3, 4)]
    machine.goes(4)


def test_what_is_kept_has_a_bound(machine: Machine) -> None:
    machine.traces.watch(1, True)
    for peer in range(PAST + 10):
        machine.comes(peer)
        machine.goes(peer)
    first = machine.shown([])
    assert len(first) == BATCH
    assert [peer for _, peer in first] == list(range(10, PAST + 10))[:BATCH]
    machine.traces.watch(1, False)
