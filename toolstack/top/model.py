"""Samples of a machine, rates between two of them, and xentop's columns (tools/xentop: names, units and order of its fields)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple


@dataclass(frozen=True, slots=True)
class Vbd:
    """A virtual disk, as its back end counts (blkback's statistics)."""

    name: str
    number: int
    out_of_requests: int = 0
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    read_sectors: int = 0
    written_sectors: int = 0


@dataclass(frozen=True, slots=True)
class Vif:
    """A network interface, as its back end counts, seen from the guest: it transmits and receives."""

    number: int
    tx_bytes: int = 0
    tx_packets: int = 0
    tx_errors: int = 0
    rx_bytes: int = 0
    rx_packets: int = 0
    rx_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Vcpu:
    """A virtual CPU."""

    number: int
    cpu: int
    state: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain at one moment."""

    domid: int
    name: str
    state: str
    """xentop's six marks: d(ying) s(hut down) b(locked) c(rashed) p(aused) r(unning)."""
    seconds: float
    """CPU time."""
    memory_kib: int
    max_kib: int
    """0: no limit."""
    ssid: int = 0
    vcpus: Sequence[Vcpu] = ()
    vbds: Sequence[Vbd] = ()
    vifs: Sequence[Vif] = ()
    cpu_percent: float = 0.0
    """Since the sample before; of one processor."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The machine at one moment."""

    time: float
    """Seconds of a monotonic clock: of the machine's."""
    clock: str
    machine: str
    cpus: int
    total_kib: int
    free_kib: int
    domains: Sequence[Domain] = field(default_factory=tuple)


Source = Callable[[], Sample]
"""Takes a sample. MachineError."""


def sample_of(answer: dict[str, Any], machine: str) -> Sample:
    """From the toolstack's answer to `top`."""
    return Sample(
        answer["time"],
        time.strftime("%H:%M:%S"),
        machine,
        answer["cpus"],
        answer["total_kib"],
        answer["free_kib"],
        tuple(
            Domain(
                row["domid"],
                row["name"],
                row["state"],
                row["seconds"],
                row["memory_kib"],
                row["max_kib"],
                row["ssid"],
                tuple(Vcpu(*vcpu) for vcpu in row["vcpus"]),
                tuple(Vbd(*vbd) for vbd in row["vbds"]),
                tuple(Vif(*vif) for vif in row["vifs"]),
            )
            for row in answer["domains"]
        ),
    )


def with_rates(before: Sample | None, now: Sample) -> Sample:
    """The later sample, with CPU percentages since the earlier."""
    if before is None or now.time <= before.time:
        return now
    known = {domain.domid: domain.seconds for domain in before.domains}
    spent = now.time - before.time
    domains = [
        domain
        if domain.domid not in known
        else _replace(domain, max(0.0, 100 * (domain.seconds - known[domain.domid]) / spent))
        for domain in now.domains
    ]
    return Sample(now.time, now.clock, now.machine, now.cpus, now.total_kib, now.free_kib, tuple(domains))


def _replace(domain: Domain, percent: float) -> Domain:
    from dataclasses import replace

    return replace(domain, cpu_percent=percent)


class Column(NamedTuple):
    """A field of xentop's: its title, width, text, and what it is sorted by. `keep`: the higher the longer it stays when room is short."""

    title: str
    width: int
    keep: int
    value: Callable[[Domain, Sample], float | str]
    text: Callable[[Domain, Sample], str]


def _count(
    of: Callable[[Vbd], int],
) -> tuple[Callable[[Domain, Sample], float], Callable[[Domain, Sample], str]]:
    def value(domain: Domain, _: Sample) -> float:
        return sum(of(vbd) for vbd in domain.vbds)

    return value, lambda domain, sample: str(int(value(domain, sample)))


def _percent(of: Callable[[Domain], int]) -> Callable[[Domain, Sample], float]:
    return lambda domain, sample: 100 * of(domain) / sample.total_kib if sample.total_kib else 0.0


def _max_percent(domain: Domain, sample: Sample) -> str:
    return f"{_percent(lambda d: d.max_kib)(domain, sample):.1f}" if domain.max_kib else "n/a"


def _net(
    of: Callable[[Vif], int],
) -> tuple[Callable[[Domain, Sample], float], Callable[[Domain, Sample], str]]:
    def value(domain: Domain, _: Sample) -> float:
        return sum(of(vif) for vif in domain.vifs)

    return value, lambda domain, sample: str(int(value(domain, sample)))


COLUMNS: Final = (
    Column("NAME", 10, 99, lambda d, s: d.name, lambda d, s: d.name),
    Column("STATE", 6, 98, lambda d, s: d.state, lambda d, s: d.state),
    Column("CPU(sec)", 10, 90, lambda d, s: d.seconds, lambda d, s: str(int(d.seconds))),
    Column("CPU(%)", 6, 97, lambda d, s: d.cpu_percent, lambda d, s: f"{d.cpu_percent:.1f}"),
    Column("MEM(k)", 10, 96, lambda d, s: d.memory_kib, lambda d, s: str(d.memory_kib)),
    Column(
        "MEM(%)",
        6,
        60,
        _percent(lambda d: d.memory_kib),
        lambda d, s: f"{_percent(lambda e: e.memory_kib)(d, s):.1f}",
    ),
    Column(
        "MAXMEM(k)", 10, 40, lambda d, s: d.max_kib, lambda d, s: str(d.max_kib) if d.max_kib else "no limit"
    ),
    Column("MAXMEM(%)", 9, 20, _percent(lambda d: d.max_kib), _max_percent),
    Column("VCPUS", 5, 80, lambda d, s: len(d.vcpus), lambda d, s: str(len(d.vcpus))),
    Column("NETS", 4, 12, *_net(lambda vif: 1)),
    Column("NETTX(k)", 8, 11, *_net(lambda vif: vif.tx_bytes // 1024)),
    Column("NETRX(k)", 8, 11, *_net(lambda vif: vif.rx_bytes // 1024)),
    Column("VBDS", 4, 50, lambda d, s: len(d.vbds), lambda d, s: str(len(d.vbds))),
    Column("VBD_OO", 8, 30, *_count(lambda v: v.out_of_requests)),
    Column("VBD_RD", 8, 85, *_count(lambda v: v.reads)),
    Column("VBD_WR", 8, 85, *_count(lambda v: v.writes)),
    Column("VBD_RSECT", 10, 45, *_count(lambda v: v.read_sectors)),
    Column("VBD_WSECT", 10, 45, *_count(lambda v: v.written_sectors)),
    Column("SSID", 4, 5, lambda d, s: d.ssid, lambda d, s: str(d.ssid)),
)


def ordered(sample: Sample, column: Column, *, descending: bool) -> list[Domain]:
    """Domains sorted by a column; equals by number."""
    return sorted(
        sorted(sample.domains, key=lambda domain: domain.domid),
        key=lambda domain: column.value(domain, sample),
        reverse=descending,
    )


def summary(sample: Sample) -> list[str]:
    """xentop's lines above the table."""
    counts = {
        word: sum(mark in domain.state for domain in sample.domains)
        for mark, word in zip(
            "rbpcds", ("running", "blocked", "paused", "crashed", "dying", "shutdown"), strict=True
        )
    }
    states = ", ".join(f"{count} {word}" for word, count in counts.items())
    used = sample.total_kib - sample.free_kib
    return [
        f"domicile top - {sample.clock}   machine {sample.machine}",
        f"{len(sample.domains)} domains: {states}",
        f"Mem: {sample.total_kib}k total, {used}k used, {sample.free_kib}k free    CPUs: {sample.cpus}",
    ]


def details(domain: Domain) -> list[str]:
    """A domain's vCPUs and disks."""
    lines = [f"{domain.name} (domain {domain.domid})"]
    lines += [
        f"  vCPU {vcpu.number}: {vcpu.state} on CPU {vcpu.cpu}, {vcpu.seconds:.1f} s" for vcpu in domain.vcpus
    ]
    for vbd in domain.vbds:
        lines.append(
            f"  {vbd.name} ({vbd.number}): {vbd.reads} reads, {vbd.writes} writes, {vbd.flushes} flushes, "
            f"{vbd.discards} discards"
        )
        lines.append(
            f"    {vbd.read_sectors} sectors read, {vbd.written_sectors} written; {vbd.out_of_requests} had to wait"
        )
    if not domain.vbds:
        lines.append("  no disks")
    return lines
