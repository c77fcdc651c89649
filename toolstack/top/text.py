"""`domicile top --batch`: as `xentop -b`, a table for each sample."""

from __future__ import annotations

import time
from typing import Final

from toolstack.cli.output import say
from toolstack.top.model import COLUMNS, Domain, Sample, Source, ordered, with_rates

SORTS: Final = {column.title.lower(): column for column in COLUMNS}


def table(
    sample: Sample,
    *,
    sort: str = "",
    full_names: bool = False,
    vcpus: bool = False,
    vbds: bool = False,
    networks: bool = False,
) -> str:
    """The table; domains by number unless `sort` names a column (in lower case)."""
    lines = [" ".join(column.title.rjust(column.width) for column in COLUMNS)]
    domains = list(sample.domains) if not sort else ordered(sample, SORTS[sort], descending=sort != "name")
    for domain in domains:
        lines.append(_row(domain, sample, full_names=full_names))
        if vcpus:
            lines.append(
                "VCPUs(sec): " + " ".join(f"{vcpu.number}: {int(vcpu.seconds):>10}s" for vcpu in domain.vcpus)
            )
        if networks:
            for vif in domain.vifs:
                lines += [
                    f"Net{vif.number} RX: {vif.rx_bytes:>8}bytes {vif.rx_packets:>8}pkts {0:>8}err {vif.rx_dropped:>8}drop  ",
                    f"TX: {vif.tx_bytes:>8}bytes {vif.tx_packets:>8}pkts {vif.tx_errors:>8}err {0:>8}drop",
                ]
        if vbds:
            lines += [
                f"VBD BlkBack {vbd.number:>6} [{vbd.number >> 8:>2x}:{vbd.number & 0xFF:>2x}]  OO: {vbd.out_of_requests:>8}   "
                f"RD: {vbd.reads:>8}   WR: {vbd.writes:>8}  RSECT: {vbd.read_sectors:>10}  WSECT: {vbd.written_sectors:>10}"
                for vbd in domain.vbds
            ]
    return "\n".join(lines)


def _row(domain: Domain, sample: Sample, *, full_names: bool) -> str:
    cells = []
    for column in COLUMNS:
        text = column.text(domain, sample)
        if column.title == "NAME" and not full_names:
            text = text[: column.width]
        cells.append(text.rjust(column.width))
    return " ".join(cells)


def run_text(
    source: Source,
    *,
    iterations: int,
    delay: float,
    sort: str = "",
    full_names: bool = False,
    vcpus: bool = False,
    vbds: bool = False,
    networks: bool = False,
) -> None:
    """Print so many tables (0: until ^C), `delay` seconds apart. The first has no CPU percentages, like xentop's."""
    before: Sample | None = None
    done = 0
    while True:
        sample = with_rates(before, source())
        say(table(sample, sort=sort, full_names=full_names, vcpus=vcpus, vbds=vbds, networks=networks))
        before = sample
        done += 1
        if iterations and done >= iterations:
            return
        time.sleep(delay)
