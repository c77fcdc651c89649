"""Verbs about the machine: up, down, info, dmesg, uptime, doctor, version, guest fetch."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from bus.addresses import PAGE_SIZE
from toolstack.cli.output import colours, pairs, say, uptime_table
from toolstack.cli.state import ask, connect, state
from toolstack.errors import EXIT_FAILED, InputError, MachineError, MachineGone, TimedOut

DOWN_TIMEOUT_S = 30.0


def add(app: typer.Typer) -> None:
    """Put the verbs into the command."""
    for name, verb in (
        ("up", up),
        ("down", down),
        ("info", info),
        ("uptime", uptime),
        ("dmesg", dmesg),
        ("doctor", doctor),
        ("version", version),
    ):
        app.command(name)(verb)


def up(
    file: Annotated[
        str, typer.Argument(metavar="[FILE.toml]", help="A machine file: the machine and its domains.")
    ] = "",
    memory: Annotated[
        int | None,
        typer.Option(metavar="MB", min=64, max=1 << 20, help="Machine memory; 4096 if nothing is said."),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=64, help="Physical processors; 0: as many as the host has."),
    ] = None,
    domio: Annotated[
        str,
        typer.Option(metavar="KIND", help="DomIO, which serves the disks: native, or guest (on a vCPU)."),
    ] = "",
) -> None:
    """Start a machine, which lives until `domicile down`. With a file all of its domains come up, or nothing does.

    Examples:

      domicile up && domicile create guest.cfg

      domicile up machine.toml                docs/reference.md has what may be in it
    """
    from toolstack.cli.up import start

    start(file, memory, cpus, domio)


def down() -> None:
    """End every domain and the machine. Example: domicile -M test down"""
    from toolstack.machine import answers, runtime_directory, warden_pidfd

    runtime = runtime_directory(state.machine)
    pidfd = warden_pidfd(runtime)
    try:
        if answers(runtime):
            client = connect()
            try:
                client.request("down", timeout=DOWN_TIMEOUT_S)
            except MachineGone:
                pass
            finally:
                client.close()
        elif pidfd is None:
            raise MachineError(f"no machine runs at {runtime.root}: nothing to take down")
        else:  # its toolstack is gone, but the warden is there
            _terminate(pidfd)
        if pidfd is not None and not _wait(pidfd, DOWN_TIMEOUT_S):
            _terminate(pidfd)
            if not _wait(pidfd, DOWN_TIMEOUT_S):
                raise TimedOut(f"machine {state.machine!r} did not go down within {2 * DOWN_TIMEOUT_S:.0f} s")
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _terminate(pidfd: int) -> None:
    import signal

    signal.pidfd_send_signal(pidfd, signal.SIGTERM)


def _wait(pidfd: int, timeout: float) -> bool:
    import select

    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout * 1000))


def info(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """What the machine is: processors, memory, scheduler, and whether its processes are isolated. Example: domicile info --json"""
    answer: dict[str, Any] = ask("info")
    names = os.uname()
    isolation = (
        "each process a uid of its own"
        if answer.get("isolated")
        else (
            "UNENFORCED: all processes share one uid; isolation between domains, read-only grants and signals rest on "
            "good behaviour (start the machine as root for a uid each)"
        )
    )
    values = {
        "host": names.nodename,
        "release": names.release,
        "machine": names.machine,
        "nr_cpus": answer["nr_cpus"],
        "max_cpu_id": answer["max_cpu_id"],
        "nr_nodes": answer["nr_nodes"],
        "cores_per_socket": answer["cores_per_socket"],
        "threads_per_core": answer["threads_per_core"],
        "cpu_mhz": f"{answer['cpu_mhz']:.3f}",
        "virt_caps": " ".join(answer["virt_caps"]),
        "total_memory": answer["total_memory"],
        "free_memory": answer["free_memory"],
        "outstanding_claims": answer["outstanding_claims"],
        "xen_major": answer["xen_major"],
        "xen_minor": answer["xen_minor"],
        "xen_extra": answer["xen_extra"],
        "xen_version": f"{answer['xen_major']}.{answer['xen_minor']}{answer['xen_extra']}",
        "xen_caps": answer["xen_caps"],
        "xen_scheduler": answer["xen_scheduler"],
        "xen_pagesize": PAGE_SIZE,
        "platform_params": f"virt_start={answer['virt_start']:#x}",
        "domicile_version": _version(),
        "domicile_isolation": isolation,
        "domicile_doorbells": "on" if answer.get("doorbells") else "off",
    }
    say(json_module.dumps({**answer, **values}) if json else pairs(values))


def uptime(
    domain: Annotated[list[str] | None, typer.Argument(metavar="[DOMAIN]...", help="Name or id.")] = None,
) -> None:
    """How long the machine and its domains have been up. Example: domicile uptime web"""
    rows = ask("uptime")
    if domain:
        wanted = {str(word) for word in domain}
        known = {str(row["domid"]) for row in rows} | {row["name"] for row in rows}
        for word in wanted - known:
            raise MachineError(f"domain {word!r} does not exist: `domicile list` shows those that do")
        rows = [row for row in rows if str(row["domid"]) in wanted or row["name"] in wanted]
    say(uptime_table(rows))


def dmesg(
    clear: Annotated[bool, typer.Option("--clear", "-c", help="Empty the log after reading.")] = False,
) -> None:
    """The hypervisor's log. Example: domicile dmesg -c"""
    from toolstack.cli.terminal import write_all

    data = ask("dmesg", clear=clear)
    write_all(data if isinstance(data, bytes) else str(data).encode())


def version() -> None:
    """Versions of Domicile and of the Xen interface. Example: domicile version"""
    say(f"domicile {_version()} (Xen 4.17 guest interface)")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of

    try:
        return of("domicile")
    except PackageNotFoundError:
        return "unknown (not installed: ./devtool setup)"


def _leaks() -> list[Any]:
    """What machines left on this host, and what the one that `--machine` names holds without need, as findings."""
    from toolstack.doctor import Finding
    from toolstack.leaks import of_machine, on_host
    from toolstack.machine import answers, runtime_directory

    found = list(on_host())
    runtime = runtime_directory(state.machine)
    where = "none on this host"
    if answers(runtime):
        found += of_machine(runtime, ask("check"))
        where = f"none on this host, nor in machine {state.machine!r}"
    if not found:
        return [Finding("leaks", True, f"{where}: processes, sockets, memfds, frames, grants, ports")]
    return [Finding(f"leak: {leak.kind}", False, leak.text, leak.mend, fatal=False) for leak in found]


def doctor(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    leaks: Annotated[
        bool,
        typer.Option(
            "--leaks", help="Only what machines left behind or hold without need; status 1 if anything."
        ),
    ] = False,
) -> None:
    """Check what a machine needs of this host, and for leaks: each finding with its mend. Status 1 if no machine can run. Example: domicile doctor --json"""
    from dataclasses import asdict

    from toolstack.doctor import examine

    findings = [*([] if leaks else examine()), *_leaks()]
    if json:
        say(json_module.dumps([asdict(finding) for finding in findings]))
    else:
        marks = {"ok": "ok", "warn": "warning", "bad": "MISSING"}
        if colours():
            marks = {
                "ok": "\x1b[32mok\x1b[0m     ",
                "warn": "\x1b[33mwarning\x1b[0m",
                "bad": "\x1b[31mMISSING\x1b[0m",
            }
        for finding in findings:
            mark = marks["ok" if finding.ok else "bad" if finding.fatal else "warn"]
            mend = f" -> {finding.mend}" if finding.mend else ""
            say(f"{mark:<8} {finding.name:<14} {finding.text}{mend}")
    if any(not finding.ok and (finding.fatal or leaks) for finding in findings):
        raise typer.Exit(EXIT_FAILED)


def fetch(what: str, path: str, output: Path | None) -> None:
    """`domicile guest fetch`."""
    from toolstack.guestfetch import GUESTS, FetchError
    from toolstack.guestfetch import fetch as fetch_guest

    if what not in GUESTS:
        raise InputError(f"guest {what!r}: there are {', '.join(GUESTS)}")
    try:
        guest = fetch_guest(what)
    except FetchError as error:
        raise MachineError(f"guest {what}: {error}") from None
    files = {"kernel": guest.kernel, "ramdisk": guest.ramdisk, "pvh_kernel": guest.pvh_kernel}
    have = {name: file for name, file in files.items() if file is not None}
    if path and path not in have:
        raise InputError(f"--path {path}: {what} has {', '.join(have)}")
    if output is not None:
        have = _copied(have, output)
    if path:
        say(str(have[path]))
        return
    for name, file in have.items():
        say(f"{name}: {file}")
    if guest.cmdline:
        say(f"cmdline: {guest.cmdline}")


def _copied(files: dict[str, Path], output: Path) -> dict[str, Path]:
    import shutil

    try:
        output.mkdir(parents=True, exist_ok=True)
        return {name: Path(shutil.copy(file, output / file.name)) for name, file in files.items()}
    except OSError as error:
        raise InputError(f"--output {output}: {os.strerror(error.errno or 0)}") from None
