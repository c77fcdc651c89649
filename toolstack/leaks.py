"""What machines leave behind, and what a running one holds without need: processes, sockets, memfds, frames, grants, ports.

Each finding says what and where, with the mend. A machine that works has none, at any moment when nothing is under way."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from toolstack.warden.runtime import RuntimeDirectory, base_directory

ENDPOINT: Final = re.compile(r"^(\d+)-[0-9a-f]{8}$")
DEVICE_BASE: Final = 1 << 31
PARENTS: Final = ("warden", "agent")
SETTLE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Leak:
    """One thing that should not be there."""

    kind: str
    """process, directory, socket, memfd, frame, grant, port, invariant"""
    text: str
    mend: str


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a machine."""

    pid: int
    parent: int
    role: str
    words: tuple[str, ...]


def processes() -> list[Process]:
    """All of this host whose name says that they are of a machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended meanwhile
        role = next(
            (word.removeprefix("domicile-") for word in words if re.fullmatch(r"domicile-[a-z0-9]+", word)),
            None,
        )
        if role is not None and state != "Z" and any("python" in word for word in words[:1]):
            found.append(Process(int(entry.name), int(parent), role, tuple(words)))
    return found


def _orphans(everything: list[Process]) -> set[int]:
    """A machine's processes are children of its warden (or of a container's agent)."""
    parents = {one.pid for one in everything if one.role in PARENTS}
    return {one.pid for one in everything if one.role not in PARENTS and one.parent not in parents}


def on_host(base: Path | None = None) -> Iterator[Leak]:
    """Processes whose machine is gone, and directories of machines that are gone."""
    everything = processes()
    orphans = _orphans(everything)
    if orphans:  # a machine that goes down at this moment is none
        time.sleep(SETTLE_S)
        orphans &= _orphans(processes())
    for one in everything:
        if one.pid in orphans:
            yield Leak("process", f"{one.role}, process {one.pid}: its machine is gone", f"kill {one.pid}")
    names = {word for one in everything if one.role == "warden" for word in one.words}
    base = base or base_directory()
    for directory in sorted(base.iterdir()) if base.is_dir() else ():
        if directory.is_dir() and not directory.name.startswith(".") and directory.name not in names:
            sockets = [
                path.name for path in (directory / "control", directory / "xenstored") if path.exists()
            ]
            if sockets or (directory / "pid").exists():
                yield Leak("directory", f"{directory}: of a machine that was killed", f"rm -r {directory}")


def of_machine(runtime: RuntimeDirectory, checked: dict[str, Any]) -> Iterator[Leak]:
    """Of a running machine. `checked`: the toolstack's answer to `check` (invariants and counters)."""
    counters: dict[str, Any] = checked["counters"]
    domains: dict[str, dict[str, int]] = {str(name): row for name, row in counters["domains"].items()}
    for problem in checked["problems"]:
        kind = next((word for word in ("grant", "frame", "port") if word in problem), "invariant")
        yield Leak(kind, problem, "report it with `domicile dmesg`: the hypervisor's records disagree")
    mapped = sum(row["mappings"] for row in domains.values())
    if counters["grant_references"] != mapped and not counters["grant_jobs"]:
        yield Leak("grant", f"{counters['grant_references']} references for {mapped} mappings", "report it")
    if counters["windows"] and not mapped and not counters["grant_jobs"]:
        yield Leak("memfd", f"{counters['windows']} windows, and nothing is mapped", "report it")
    used = sum(row["frames"] for row in domains.values())
    if counters["free_pages"] + used > counters["total_pages"]:
        yield Leak(
            "frame",
            f"{used} frames in use and {counters['free_pages']} free, of {counters['total_pages']}",
            "report it",
        )
    alone = len(domains) == 1
    if alone and domains["0"]["mappings"]:
        yield Leak(
            "grant", f"Dom0 maps {domains['0']['mappings']} frames of domains that are gone", "report it"
        )
    yield from _processes(runtime, domains)
    yield from _sockets(runtime, domains)
    yield from _memfds(runtime, len(domains), counters["windows"])


def _children(runtime: RuntimeDirectory) -> list[Process]:
    try:
        warden = int(runtime.pid.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return []
    return [one for one in processes() if one.parent == warden]


def _processes(runtime: RuntimeDirectory, domains: dict[str, dict[str, int]]) -> Iterator[Leak]:
    known = {row["pid"] for row in domains.values()}
    there = {one.pid for one in _children(runtime)}
    for name, row in domains.items():
        if row["pid"] and there and row["pid"] not in there:
            yield Leak("process", f"domain {name}: process {row['pid']} is not there", "report it")
    # One of a role waits with its code loaded.
    waiting = Counter(
        one.role
        for one in _children(runtime)
        if one.role in ("domu", "domio", "netio", "dom0") and one.pid not in known
    )
    for role, count in waiting.items():
        if count > 1:
            yield Leak("process", f"{count} processes of role {role} belong to no domain", "report it")


def _sockets(runtime: RuntimeDirectory, domains: dict[str, dict[str, int]]) -> Iterator[Leak]:
    ends: Counter[int] = Counter()
    for path in runtime.bus.iterdir() if runtime.bus.is_dir() else ():
        found = ENDPOINT.match(path.name)
        if found:
            ends[int(found.group(1))] += 1
    for number, count in sorted(ends.items()):
        if number < DEVICE_BASE and str(number) not in domains:
            yield Leak("socket", f"{count} sockets of domain {number}, which is gone", f"in {runtime.bus}")
        elif count > 1:
            yield Leak("socket", f"{count} sockets of domain {number}: one is enough", f"in {runtime.bus}")


def _memfds(runtime: RuntimeDirectory, domains: int, windows: int) -> Iterator[Leak]:
    """What the hypervisor has open. Only root may look."""
    hypervisor = next((one.pid for one in _children(runtime) if one.role == "hypervisor"), None)
    if hypervisor is None:
        return
    try:
        names = [os.readlink(f"/proc/{hypervisor}/fd/{fd}") for fd in os.listdir(f"/proc/{hypervisor}/fd")]
    except OSError:
        return
    # By name: a mapping holds a descriptor of its own. The I/O page tables' frames are an extent as well.
    kinds = Counter(
        name.removeprefix("/memfd:domicile-").split("-")[0].split(" ")[0]
        for name in set(names)
        if name.startswith("/memfd:domicile-")
    )
    for kind, most in (("extent", domains + 1), ("window", windows), ("lease", domains), ("credentials", 0)):
        if kinds[kind] > most:
            yield Leak(
                "memfd", f"the hypervisor holds {kinds[kind]} of kind {kind}, {most} are in use", "report it"
            )
