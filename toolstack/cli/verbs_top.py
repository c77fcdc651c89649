"""`domicile top`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from toolstack.errors import InputError, MachineError


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("top")(top)


def top(
    batch: Annotated[bool, typer.Option("--batch", "-b", help="Text, as `xentop -b`; no keys.")] = False,
    iterations: Annotated[
        int,
        typer.Option(
            "--iterations", "-i", metavar="N", min=0, help="With --batch: end after N tables; 0: go on."
        ),
    ] = 0,
    delay: Annotated[
        float,
        typer.Option("--delay", "-d", metavar="S", min=0.1, max=3600, help="Seconds between two looks."),
    ] = 3.0,
    sort: Annotated[
        str,
        typer.Option(
            metavar="COLUMN", help="With --batch: by this column, such as 'CPU(%)'; by number otherwise."
        ),
    ] = "",
    full_names: Annotated[
        bool, typer.Option("--full-name", "-f", help="With --batch: names are not cut to ten letters.")
    ] = False,
    vcpus: Annotated[
        bool, typer.Option("--vcpus", "-v", help="With --batch: CPU time of each vCPU.")
    ] = False,
    vbds: Annotated[bool, typer.Option("--vbds", "-x", help="With --batch: counters of each disk.")] = False,
    networks: Annotated[
        bool, typer.Option("--networks", "-n", help="With --batch: counters of each network interface.")
    ] = False,
) -> None:
    """Domains and what they use, live. Keys: s sorts, r reverses, d or Enter shows vCPUs and disks, q ends.

    Examples:

      domicile top

      domicile top -b -i 2 -d 1 -x            two tables a second apart, with the counters of each disk
    """
    from toolstack.cli.state import connect, state
    from toolstack.top.model import Sample, sample_of

    plain = batch or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb"
    client = connect()

    def source() -> Sample:
        return sample_of(client.request("top"), state.machine)

    try:
        if plain:
            from toolstack.top.text import SORTS, run_text

            if sort.lower() not in ("", *SORTS):
                raise InputError(
                    f"--sort {sort}: there are {', '.join(column.title for column in SORTS.values())}"
                )
            rounds = iterations if batch else iterations or 1
            run_text(
                source,
                iterations=rounds,
                delay=delay,
                sort=sort.lower(),
                full_names=full_names,
                vcpus=vcpus,
                vbds=vbds,
                networks=networks,
            )
            return
        from toolstack.top.app import Top

        why = Top(source, delay=delay).run()
        if why:
            raise MachineError(why)
    finally:
        client.close()
