"""NetIO of a machine with a fault plan (a program, in place of `domains.netio`): the steps of its back ends are events."""

from __future__ import annotations

from typing import Any, Final

import domains.netio.__main__ as product
import domains.netio.vif as vif
from drivers.net.backend import Backend
from simulation.live.edge import Edge

EDGE: Final = Edge("netio")


def step(name: str) -> None:
    """A crash point of the back end."""
    EDGE.happen(f"step:net-{name}")


def made_backend(*arguments: Any, **options: Any) -> Backend:
    """As always, with the hook that it has for this."""
    return Backend(*arguments, hook=step, **options)


if __name__ == "__main__":
    vars(vif).update(Backend=made_backend)
    product.main()
