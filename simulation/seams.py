"""Where the product's code meets clock and crash points: replaced for the time of a run, in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import domains.dom0.xenstore_service as service
import domains.domio.vbd as vbd
import domains.native.xenstore as client
import domains.netio.bridges as bridges
import domains.netio.vif as vif
from bus.addresses import DomId
from bus.log import Logger
from drivers.block.backend import Backend
from drivers.block.ledger import Ledger
from drivers.net.backend import Backend as NetBackend
from simulation.machine import Machine


@contextlib.contextmanager
def joined(machine: Machine) -> Iterator[None]:
    """Simulated time for the modules that read a clock, and hooks for back ends and ledgers that are made meanwhile."""

    def hook(prefix: str) -> Any:
        process = machine.processes.get(DomId(1))

        happen = machine.injector.happen
        names: dict[str, str] = {}

        def step(name: str) -> None:
            event = names.get(name)
            if event is None:
                event = names[name] = f"{prefix}{name.removeprefix('ledger.')}"
            happen(event)
            if process is not None:
                process.pause()
                process.check()

        return step

    def backend(*args: Any, **options: Any) -> Backend:
        return vbd_backend(*args, hook=hook("step:"), **options)

    def ledger(memory: memoryview) -> Ledger:
        made = vbd_ledger(memory)
        made.hook = hook("ledger:")
        return made

    clock = SimpleNamespace(
        monotonic_ns=lambda: machine.scheduler.now, monotonic=lambda: machine.scheduler.now / 1e9
    )

    def net_backend(*args: Any, **options: Any) -> NetBackend:
        return vif_backend(*args, hook=hook("step:net-"), **options)

    vif_backend: type[NetBackend] = vars(vif)["Backend"]
    vbd_backend: type[Backend] = vars(vbd)["Backend"]
    vbd_ledger: type[Ledger] = vars(vbd)["Ledger"]
    saved = [(module, name, getattr(module, name)) for module, name in (
        (service, "time"), (vbd, "time"), (client, "time"), (vbd, "Backend"), (vbd, "Ledger"),
        (vif, "time"), (bridges, "time"), (vif, "Backend"),
    ) if hasattr(module, name)]  # fmt: skip

    def write(self: Logger, level: str, event: str, **fields: Any) -> None:
        machine.trace(f"{self._bound['role']} {event}")

    plain = Logger.write
    try:
        for module in (service, vbd, client, vif, bridges):
            vars(module)["time"] = clock
        Logger.write = write  # type: ignore[method-assign]  # for the time of a run
        vars(vbd).update(Backend=backend, Ledger=ledger)
        vars(vif).update(Backend=net_backend)
        yield
    finally:
        Logger.write = plain  # type: ignore[method-assign]
        for module, name, value in saved:
            vars(module)[name] = value
