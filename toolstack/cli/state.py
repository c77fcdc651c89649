"""What the options before the verb said, and the way to the machine that they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolstack.client import ControlClient


@dataclass(slots=True)
class State:
    """One command's."""

    machine: str = "default"


state = State()


def connect() -> ControlClient:
    """A connection to the machine. MachineError if none runs."""
    from toolstack.client import ControlClient
    from toolstack.machine import runtime_directory

    return ControlClient(runtime_directory(state.machine).control)


def ask(verb: str, **arguments: Any) -> Any:
    """One request, its result."""
    client = connect()
    try:
        return client.request(verb, {name: value for name, value in arguments.items() if value is not None})
    finally:
        client.close()
