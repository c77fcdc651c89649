"""Verbs that look into a running machine: trace."""

from __future__ import annotations

from typing import Annotated

import typer

from toolstack.errors import InputError


def add(app: typer.Typer) -> None:
    """Put the verbs into the command."""
    app.command("trace")(trace)


def trace(
    dma: Annotated[
        bool, typer.Option("--dma", help="Follow disk requests: grant, PRP, DMA request, machine address.")
    ] = False,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write a timeline that opens at ui.perfetto.dev."
        ),
    ] = "",
    domain: Annotated[
        str, typer.Option("--domain", "-d", metavar="DOMAIN", help="With --dma: this frontend's requests.")
    ] = "",
    count: Annotated[
        int, typer.Option("--count", "-n", metavar="N", min=0, help="With --dma: end after N requests.")
    ] = 0,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=0, help="How long; 0: until ^C (which is a good end).")
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="With --dma: one JSON object a line.")] = False,
) -> None:
    """What happens in the machine, as it happens.

    Examples:

      domicile trace --dma                    each disk request with the three steps of its data

      domicile trace --dma -d web -n 1        one request of `web`

      domicile trace -o t.json --seconds 5    five seconds of all processes, for ui.perfetto.dev
    """
    from toolstack.cli.trace import follow_dma, record

    if dma == bool(output):
        raise InputError("trace: say which: --dma, or --output FILE")
    if output:
        if domain or count or json:
            raise InputError("trace: --domain, --count and --json go with --dma")
        record(output, seconds)
        return
    follow_dma(domain, count, seconds, json=json)
