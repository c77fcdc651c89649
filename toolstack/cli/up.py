"""`domicile up`."""

from __future__ import annotations

import time

from toolstack.cli.images import Images, make_config
from toolstack.cli.output import say, warn
from toolstack.cli.state import connect, state
from toolstack.doctor import require_quick
from toolstack.domio import check_kind
from toolstack.errors import MachineError
from toolstack.machine import Machine
from toolstack.machinefile import MachineFile, read_machine_file
from toolstack.xlcfg.model import XlConfig


def start(file: str, memory: int | None, cpus: int | None, domio: str = "") -> None:
    """Start the machine, and what its file names. Options go before the file. InputError before anything is started; MachineError."""
    wanted = read_machine_file(file) if file else MachineFile()
    kind = check_kind(domio, "--domio") if domio else wanted.domio
    for config, paused in wanted.domains:
        for warning in config.warnings:
            warn(warning)
        with Images() as images:  # what is missing is told before anything is started
            make_config({**config.domain_fields(), "paused": paused}, images)
    require_quick(0)
    began = time.monotonic()
    size = wanted.memory if memory is None else memory
    processors = wanted.cpus if cpus is None else cpus
    Machine(state.machine, memory_mb=size, cpus=processors, detached=True, domio=kind).close()
    say(f"machine {state.machine!r} is up ({time.monotonic() - began:.2f} s): {size} MB")
    try:
        for config, paused in wanted.domains:
            _create(config, paused)
    except BaseException:
        from toolstack.cli.verbs_machine import down

        down()
        raise


def _create(config: XlConfig, paused: bool) -> None:
    with Images() as images:
        domain = make_config({**config.domain_fields(), "paused": paused}, images)
        client = connect()
        try:
            number = client.request("create", {"config": domain, "attach": False}, images.descriptors)
        except MachineError as error:
            raise MachineError(
                f"domain {config.name}: {error}: the machine is taken down again", error.code
            ) from None
        finally:
            client.close()
    say(f"domain {number}: {config.name}{' (paused)' if paused else ''}")
