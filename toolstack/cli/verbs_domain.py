"""Verbs about domains: create, list, vcpu-list, console, shutdown, reboot, destroy, pause, unpause, domid, domname,
sched-credit2."""

from __future__ import annotations

from typing import Annotated

import typer

from toolstack.cli.output import domain_json, domain_table, say, scheduler_table, vcpu_table
from toolstack.cli.state import ask
from toolstack.errors import InputError, MachineError

Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="Name or id.")]


def add(app: typer.Typer) -> None:
    """Put the verbs into the command."""
    for name, verb in (
        ("create", create),
        ("list", list_),
        ("vcpu-list", vcpu_list),
        ("vcpu-pin", vcpu_pin),
        ("console", console),
        ("screenshot", screenshot),
        ("send-key", send_key),
        ("vncviewer", vncviewer),
        ("shutdown", shutdown),
        ("reboot", reboot),
        ("destroy", destroy),
        ("pause", pause),
        ("unpause", unpause),
        ("domid", domid),
        ("domname", domname),
        ("sched-credit2", scheduler),
    ):
        app.command(name)(verb)


def create(
    file: Annotated[str, typer.Argument(metavar="FILE.cfg", help="Configuration in xl.cfg's grammar.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="More lines, as if at the file's end."),
    ] = None,
    paused: Annotated[bool, typer.Option("--paused", "-p", help="Leave it paused.")] = False,
    attach: Annotated[bool, typer.Option("--console", "-c", help="Attach to its console.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dryrun", "-n", help="Say what the configuration means, and start nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing.")] = False,
) -> None:
    """Make and start a domain. Example: domicile create debian.cfg 'memory=512'"""
    from toolstack.cli.create import create_domain

    create_domain(file, settings or [], paused=paused, attach=attach, dry_run=dry_run, quiet=quiet)


def list_(
    domain: Annotated[list[str] | None, typer.Argument(metavar="[DOMAIN]...", help="Name or id.")] = None,
    long: Annotated[bool, typer.Option("--long", "-l", help="Everything, as JSON.")] = False,
) -> None:
    """Domains and their state (r running, b blocked, p paused, s shut down, c crashed, d dying). Example: domicile list -l web"""
    rows = ask("list")
    if domain:
        rows = [row for row in rows if row["name"] in domain or str(row["domid"]) in domain]
        known = {str(row["domid"]) for row in rows} | {row["name"] for row in rows}
        for word in domain:
            if word not in known:
                raise MachineError(f"domain {word!r} does not exist: `domicile list` shows those that do")
    say(domain_json(rows) if long else domain_table(rows))


def vcpu_list(
    domain: Annotated[list[str] | None, typer.Argument(metavar="[DOMAIN]...", help="Name or id.")] = None,
) -> None:
    """Virtual processors. Example: domicile vcpu-list web"""
    rows = ask("vcpu-list")
    if domain:
        known = {str(row["domid"]) for row in rows} | {row["name"] for row in rows}
        for word in domain:
            if word not in known:
                raise MachineError(f"domain {word!r} does not exist: `domicile list` shows those that do")
        rows = [row for row in rows if row["name"] in domain or str(row["domid"]) in domain]
    say(vcpu_table(rows))


def vcpu_pin(
    domain: Domain,
    vcpu: Annotated[str, typer.Argument(metavar="VCPU|all", help="Number of the virtual processor.")],
    hard: Annotated[
        str, typer.Argument(metavar="CPUS|all|-", help="Where it may run, such as 0-1,3; -: as it is.")
    ],
    soft: Annotated[
        str, typer.Argument(metavar="[CPUS|all|-]", help="Where it would best run; only shown.")
    ] = "-",
) -> None:
    """Choose the physical processors of a guest's vCPU. Example: domicile vcpu-pin web all 1"""
    from toolstack.xlcfg.cpus import MAX_CPU, parse_cpus

    if vcpu != "all" and not vcpu.isdigit():
        raise InputError(f"vcpu-pin: vCPU {vcpu!r}: a number, or all")
    wanted: dict[str, list[int]] = {}
    for name, text in (("hard", hard), ("soft", soft)):
        if text == "-":
            continue
        try:
            cpus = parse_cpus(text)
        except ValueError as error:
            raise InputError(f"vcpu-pin: {error}") from None
        wanted[name] = sorted(cpus) if cpus is not None else list(range(MAX_CPU + 1))
    if not wanted:
        raise InputError("vcpu-pin: neither hard nor soft affinity is given")
    ask("vcpu-pin", domain=domain, vcpu=None if vcpu == "all" else int(vcpu), **wanted)


def console(
    domain: Domain,
    replay: Annotated[
        bool, typer.Option("--replay/--no-replay", help="Show first what the guest wrote before.")
    ] = True,
    kind: Annotated[
        str,
        typer.Option(
            "-t", "--type", metavar="KIND", help="pv or serial; by default serial where there is one."
        ),
    ] = "",
) -> None:
    """Attach to a domain's console; ^] leaves it. Example: domicile console web"""
    from toolstack.cli.attach import attach

    if kind not in ("", "pv", "serial"):
        raise InputError(f"console -t {kind}: there are pv and serial")
    attach(domain, replay=replay, kind=kind)


def screenshot(
    domain: Domain,
    file: Annotated[str, typer.Argument(metavar="FILE.png", help="Where to put it; - for standard output.")],
) -> None:
    """A picture of a full HVM guest's screen, as PNG. Example: domicile screenshot pc screen.png"""
    from toolstack.cli.screen import save

    save(domain, file)


def send_key(
    domain: Domain,
    keys: Annotated[
        list[str],
        typer.Argument(metavar="KEY...", help="Keys, or several at once such as ctrl-alt-delete."),
    ],
    text: Annotated[bool, typer.Option("--text", help="The words are text to type (US keyboard).")] = False,
) -> None:
    """Press keys of a full HVM guest's keyboard. Example: domicile send-key pc esc 2 ret"""
    from toolstack.cli.screen import key_names

    ask("send-key", domain=domain, keys=key_names(keys, text=text))


def vncviewer(domain: Domain) -> None:
    """Print where the VNC server of a full HVM guest listens, for a viewer. Example: domicile vncviewer pc"""
    found = ask("vnc", domain=domain)
    address = f"[{found['address']}]" if ":" in found["address"] else found["address"]
    say(f"{address}::{found['port']}")


def shutdown(
    domain: Annotated[str | None, typer.Argument(metavar="[DOMAIN]", help="Name or id.")] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="All domains.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Until they are gone.")] = False,
    fallback: Annotated[
        bool, typer.Option("-F", help="Use the ACPI power button where a guest has no PV drivers (HVM).")
    ] = False,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="How long -w waits; then status 124.")
    ] = 300,
) -> None:
    """Ask guests to power off. Example: domicile shutdown -a -w --timeout 60"""
    from toolstack.cli.attach import ask_to_stop

    ask_to_stop("poweroff", domain, every=every, wait=wait, fallback=fallback, timeout=timeout)


def reboot(
    domain: Annotated[str | None, typer.Argument(metavar="[DOMAIN]", help="Name or id.")] = None,
    every: Annotated[bool, typer.Option("--all", "-a", help="All domains.")] = False,
    fallback: Annotated[
        bool, typer.Option("-F", help="Use the ACPI reset where a guest has no PV drivers (HVM).")
    ] = False,
) -> None:
    """Ask guests to reboot. Example: domicile reboot web"""
    from toolstack.cli.attach import ask_to_stop

    ask_to_stop("reboot", domain, every=every, wait=False, fallback=fallback, timeout=0)


def destroy(domain: Domain) -> None:
    """End a domain at once. Example: domicile destroy web"""
    _not_dom0(domain, "destroy")
    ask("destroy", domain=domain)


def pause(domain: Domain) -> None:
    """Stop a domain's virtual processors. Example: domicile pause web"""
    _not_dom0(domain, "pause")
    ask("pause", domain=domain)


def unpause(domain: Domain) -> None:
    """Let a paused domain run. Example: domicile unpause web"""
    ask("unpause", domain=domain)


def _not_dom0(domain: str, verb: str) -> None:
    if domain in ("0", "Domain-0"):
        raise InputError(f"{verb}: not Domain-0: `domicile down` ends the machine")


def domid(domain: Domain) -> None:
    """The id of a domain. Example: domicile domid web"""
    say("0" if domain in ("0", "Domain-0") else str(ask("domid", domain=domain)))


def domname(domain: Annotated[str, typer.Argument(metavar="DOMID", help="Id.")]) -> None:
    """The name of a domain. Example: domicile domname 3"""
    if not domain.isdigit():
        raise InputError(f"domname {domain!r}: give a number (`domicile domid NAME` goes the other way)")
    say(ask("domname", domain=domain))


def scheduler(
    domain: Annotated[
        str | None, typer.Option("--domain", "-d", metavar="DOMAIN", help="Name or id.")
    ] = None,
    weight: Annotated[
        int | None,
        typer.Option("--weight", "-w", min=1, max=65535, help="Share under contention; 256 is usual."),
    ] = None,
    cap: Annotated[
        int | None,
        typer.Option("--cap", "-c", min=0, max=65535, help="Most percent of one processor; 0: none."),
    ] = None,
) -> None:
    """Show or set the scheduler's parameters. Example: domicile sched-credit2 -d web -w 512"""
    if domain is None and (weight is not None or cap is not None):
        raise InputError("sched-credit2: --weight and --cap need a domain: -d DOMAIN")
    rows = ask("sched-credit2", domain=domain, weight=weight, cap=cap)
    if weight is None and cap is None:
        say(scheduler_table(rows))
