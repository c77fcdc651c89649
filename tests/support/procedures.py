"""Procedures of a xenstore client (drivers.xenbus.client), carried out without a xenstored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from bus.abi.io.xs_wire import XS_READ
from drivers.xenbus.client import Answer, Procedure, Request, XenstoreError

T = TypeVar("T")


def reading(procedure: Procedure[T], read: Callable[[str], bytes | None]) -> T:
    """The result of one that only reads."""

    def answer(request: Request) -> Answer:
        assert request.type == XS_READ
        value = read(request.payload.rstrip(b"\0").decode())
        return XenstoreError("ENOENT") if value is None else value

    try:
        asked = next(procedure)
        while True:
            if isinstance(asked, list):
                asked = procedure.send([answer(each) for each in asked])
            elif isinstance(found := answer(asked), XenstoreError):
                asked = procedure.throw(found)
            else:
                asked = procedure.send(found)
    except StopIteration as stop:
        result: T = stop.value
        return result
