"""`domicile trace`: watching until it is enough."""

from __future__ import annotations

import json as json_module
import signal
import time
from collections.abc import Iterator
from typing import Final

from toolstack.cli.output import say, warn
from toolstack.cli.state import connect
from toolstack.errors import MachineError
from toolstack.trace.dma import Request, RequestJoiner, loose_text, request_text
from toolstack.trace.recorder import open_output
from toolstack.trace.session import Entry, TraceSession
from toolstack.trace.timeline import Timeline

POLL_S: Final = 0.05


def watched(session: TraceSession, seconds: float) -> Iterator[list[Entry]]:
    """Records in order of time, until the time is over, the machine is gone, or ^C, wherever that comes; a second ^C ends it at once."""
    deadline = time.monotonic() + seconds if seconds else None
    stopped = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        while not (stopped or session.gone) and (deadline is None or time.monotonic() < deadline):
            yield session.poll()
            time.sleep(POLL_S)  # there is nothing to wait on: nobody is told of a record
        yield session.poll(last=True)
    finally:
        signal.signal(signal.SIGINT, before)


def follow_dma(domain: str, count: int, seconds: float, *, json: bool) -> None:
    """`trace --dma`. MachineError."""
    session = TraceSession(connect())
    try:
        if domain and domain not in session.names.values() and not _number(domain, session):
            raise MachineError(f"domain {domain!r} does not exist: `domicile list` shows those that do")
        joiner = RequestJoiner()
        shown = 0
        for entries in watched(session, seconds):
            for found in joiner.feed(entries):
                if isinstance(found, Request):
                    name = session.names.get(found.domain, "")
                    if domain and domain not in (name, str(found.domain)):
                        continue
                    text = (
                        json_module.dumps(found.plain(name)) if json else request_text(found, session.names)
                    )
                    shown += 1
                else:
                    text = json_module.dumps(found.plain()) if json else loose_text(found, session.names)
                print(text, flush=True)
                if count and shown >= count:
                    return
        _tell_losses(session, joiner.forgotten)
    finally:
        session.close()


def record(path: str, seconds: float) -> None:
    """`trace --output`: a timeline, until the time is over, the machine is gone, or ^C. InputError, MachineError."""
    with open_output(path) as file:
        session = TraceSession(connect())
        try:
            timeline = Timeline(file, session.began, session.names)
            for entries in watched(session, seconds):
                timeline.feed(entries)
            timeline.close()
            say(f"{path}: {timeline.events} events; open it at ui.perfetto.dev")
            if timeline.left_out:
                warn(f"trace: {timeline.left_out} more events were left out")
            _tell_losses(session)
        finally:
            session.close()


def _number(domain: str, session: TraceSession) -> bool:
    return domain.isdigit() and int(domain) in session.names


def _tell_losses(session: TraceSession, forgotten: int = 0) -> None:
    if session.dropped:
        warn(f"trace: {session.dropped} records were written over before they were read")
    if forgotten:
        warn(f"trace: of {forgotten} requests no answer was seen")
