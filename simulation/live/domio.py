"""DomIO of a machine with a fault plan (a program, in place of `domains.domio`): the steps of its back ends are events."""

from __future__ import annotations

from typing import Any, Final

import domains.domio.__main__ as product
import domains.domio.vbd as vbd
from drivers.block.backend import Backend
from drivers.block.ledger import Ledger
from simulation.live.edge import Edge

EDGE: Final = Edge("domio")


def step(name: str) -> None:
    """A crash point of the back end."""
    EDGE.happen(f"step:{name}")
    if name == "taken":
        EDGE.happen("ring:request")


def made_backend(*arguments: Any, **options: Any) -> Backend:
    """As always, with the hook that it has for this."""
    return Backend(*arguments, hook=step, **options)


def made_ledger(memory: memoryview) -> Ledger:
    """The same."""
    ledger = Ledger(memory)

    def write(name: str) -> None:
        EDGE.happen(f"ledger:{name.removeprefix('ledger.')}")

    ledger.hook = write
    return ledger


if __name__ == "__main__":
    vars(vbd).update(Backend=made_backend, Ledger=made_ledger)
    product.main()
