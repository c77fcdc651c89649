"""Dom0 of a machine with a fault plan (a program, in place of `domains.dom0`): XenbusStates and console lines are events."""

from __future__ import annotations

import re
from typing import Any, Final

import domains.dom0.__main__ as product
from domains.dom0.consoled import Terminal
from domains.dom0.xenstore.core import Core
from simulation.live.edge import Edge

EDGE: Final = Edge("dom0")
STATE: Final = re.compile(rb"^/local/domain/\d+/(backend|device)/(?:vbd|vif)/.*/state$")
LINE_LIMIT: Final = 4096


def main() -> None:
    """Entry point of the process."""
    fire, output = Core._fire, Terminal.output
    lines: dict[int, bytearray] = {}

    def watched_fire(self: Core, origin: Any = None) -> None:
        for change in self._changes:
            found = STATE.match(change.path)
            node = self.store.get(change.path) if found else None
            if found and node is not None:
                end = "back" if found.group(1) == b"backend" else "front"
                EDGE.happen(f"xenbus:{end}:{node.value.decode('ascii', 'replace')}")
        fire(self, origin)

    def watched_output(self: Terminal, data: bytes) -> None:
        line = lines.setdefault(id(self), bytearray())
        line += data
        while (at := line.find(b"\n")) >= 0:
            EDGE.line(line[:at].decode("latin1"))
            del line[: at + 1]
        del line[:-LINE_LIMIT]
        output(self, data)

    Core._fire = watched_fire  # type: ignore[method-assign]  # this program's purpose
    Terminal.output = watched_output  # type: ignore[method-assign]
    product.main()


if __name__ == "__main__":
    main()
