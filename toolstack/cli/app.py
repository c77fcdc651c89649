"""Verbs, options and help texts. What a verb does is in the modules that it imports when it is called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from toolstack.cli import (
    registers,
    verbs_adjust,
    verbs_devices,
    verbs_domain,
    verbs_faults,
    verbs_machine,
    verbs_network,
    verbs_top,
    verbs_trace,
    verbs_xenstore,
)
from toolstack.cli.state import state
from toolstack.errors import EXIT_INTERRUPTED, InputError

EXIT_CODES: Final = (
    "Exit status: 0 done, or the guest powered off, or --until matched; 1 the guest crashed, or what was asked "
    "could not be done; 2 bad input (option, file, configuration); 124 timeout; 130 interrupted; 128+N ended by "
    "signal N. Errors are one line on standard error."
)
ClickException: Final[type[BaseException]] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)
Abort: Final[type[Exception]] = typer.Abort
NOT_BUILT: Final = frozenset(
    [
        "save",
        "restore",
        "migrate",
        "migrate-receive",
        "remus",
        "dump-core",
        "cd-insert",
        "cd-eject",
        "pci-attach",
        "pci-detach",
        "channel-list",
        "claims",
        "config-update",
        "cpupool-create",
        "cpupool-destroy",
        "cpupool-list",
        "cpupool-rename",
        "cpupool-cpu-add",
        "cpupool-cpu-remove",
        "cpupool-migrate",
        "cpupool-numa-split",
        "sched-credit",
        "sched-rtds",
        "usbctrl-attach",
        "usbctrl-detach",
        "usbdev-attach",
        "usbdev-detach",
        "usb-list",
        "vtpm-attach",
        "vtpm-detach",
        "vtpm-list",
        "vkb-attach",
        "vkb-detach",
        "vkb-list",
        "vsnd-attach",
        "vsnd-detach",
        "vsnd-list",
        "vdispl-attach",
        "vdispl-detach",
        "vdispl-list",
        "qemu-monitor-command",
        "psr-hwinfo",
        "psr-cmt-show",
        "getenforce",
        "setenforce",
        "loadpolicy",
        "reset-passthrough",
    ]
)
"""Verbs of xl that are known here, and refused."""
_NO_COMMAND: Final = re.compile(r"No such command '([a-z0-9-]+)'")

app = typer.Typer(
    name="domicile",
    help="A Xen machine made of ordinary processes.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: a quarter of the time, and the same in a log
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def common(
    machine: Annotated[
        str,
        typer.Option("--machine", "-M", metavar="NAME", envvar="DOMICILE_MACHINE", help="Which machine."),
    ] = "default",
) -> None:
    """A Xen machine made of ordinary processes: `domicile run KERNEL`, or `domicile up` and then xl's verbs."""
    state.machine = machine


@app.command(epilog=EXIT_CODES)
def run(
    kernel: Annotated[
        str,
        typer.Argument(
            metavar="[KERNEL]", help="PV or PVH kernel: ELF with Xen notes, or bzImage. None for type hvm."
        ),
    ] = "",
    ramdisk: Annotated[str, typer.Option(metavar="FILE", help="Initial ramdisk.")] = "",
    cmdline: Annotated[str, typer.Option(metavar="TEXT", help="Kernel command line.")] = "",
    memory: Annotated[int, typer.Option(metavar="MB", min=1, max=1 << 20, help="Guest memory.")] = 128,
    vcpus: Annotated[int, typer.Option(metavar="N", min=1, max=128, help="Virtual processors.")] = 1,
    type_: Annotated[str, typer.Option("--type", metavar="KIND", help="pv, pvh or hvm.")] = "pv",
    disk: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Disk, as in xl.cfg; repeatable.")
    ] = None,
    vif: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Network interface, as in xl.cfg; repeatable.")
    ] = None,
    net: Annotated[
        bool, typer.Option("--net", help="A network interface on the bridge xenbr0: --vif bridge=xenbr0.")
    ] = False,
    net_host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS/LENGTH",
            help="A helper host on xenbr0: answers ARP and ping, gives addresses by DHCP (10.0.0.1/24).",
        ),
    ] = "",
    nvme: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="PVH: an NVMe controller of the guest's own, FILE[,raw|qcow2][,r|w][,bdf=BUS:DEV.FN]; repeatable.",
        ),
    ] = None,
    pci: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BDF", help="PVH: give it the --nvme at that address (all, if none is named); repeatable."
        ),
    ] = None,
    pvshim: Annotated[
        bool,
        typer.Option(
            "--pvshim", help="PVH: KERNEL is a PV kernel (64-bit or 32-bit); Xen's shim starts and runs it."
        ),
    ] = False,
    boot: Annotated[
        str, typer.Option(metavar="ORDER", help="HVM: what is tried, c disk, d optical drive.")
    ] = "cd",
    cdrom: Annotated[str, typer.Option(metavar="FILE", help="HVM: image in an optical drive (hdc).")] = "",
    serial: Annotated[
        bool | None,
        typer.Option(
            "--serial/--no-serial",
            help="HVM: a serial line, which is the console here, the BIOS's too. On, but for an ELF --firmware.",
        ),
    ] = None,
    firmware: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="HVM: SeaBIOS (Debian's by default), or an ELF program in the place of hvmloader and BIOS.",
        ),
    ] = "",
    name: Annotated[str, typer.Option(metavar="NAME", help="Domain name; the kernel's by default.")] = "",
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="Seconds for the whole run; then status 124. 0: none.")
    ] = 0,
    until: Annotated[
        str,
        typer.Option(
            metavar="REGEX", help="End with status 0 when the console shows this (after all --expect)."
        ),
    ] = "",
    input_: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="TEXT",
            help=r"Type this once the guest has written anything; \r \n \xHH are known.",
        ),
    ] = "",
    expect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX", help="Wait for this, then type its --send; pairs in order, repeatable."
        ),
    ] = None,
    send: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What to type for the --expect of the same place."),
    ] = None,
    reboot: Annotated[
        bool,
        typer.Option("--reboot/--no-reboot", help="Start a guest that reboots again, or end with status 0."),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No console on standard output.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="A record of the run in JSON as the last line of standard output.")
    ] = False,
    json_file: Annotated[str, typer.Option(metavar="FILE", help="The same record into a file.")] = "",
    cpus: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=64, help="Physical processors of the machine; 0: the host's."),
    ] = 0,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="On the machine that runs already (`domicile up`, compose.yaml); only the guest is taken down.",
        ),
    ] = False,
    trace: Annotated[str, typer.Option(metavar="FILE", help="Write a timeline for ui.perfetto.dev.")] = "",
    hap: Annotated[
        bool, typer.Option("--hap/--no-hap", help="HVM and PVH: two-level paging, or shadow page tables.")
    ] = True,
    vnc: Annotated[
        bool,
        typer.Option("--vnc", help="HVM: a VNC server on 127.0.0.1; its port is told on standard error."),
    ] = False,
    domio: Annotated[
        str,
        typer.Option(metavar="KIND", help="DomIO, which serves the disks: native, or guest (on a vCPU)."),
    ] = "native",
) -> None:
    r"""Boot one guest on a machine of its own, its console here, and take all down.

    Keys go to the guest where standard input is a terminal; ^] (or ^C three times within a second) ends the run.

    Example: domicile run grub-x86_64-xen.bin --expect 'grub>' --send 'halt\r' --timeout 30
    """
    from toolstack.cli.images import is_elf
    from toolstack.cli.verbs_run import run_verb

    fields: dict[str, Any] = {
        "kernel": kernel,
        "ramdisk": ramdisk,
        "cmdline": cmdline,
        "memory_mb": memory,
        "vcpus": vcpus,
        "type": type_,
        "name": name,
        "hap": hap,
    }
    if pvshim:
        fields["pvshim"] = True
    if type_ == "hvm":
        if serial is None:
            serial = not is_elf(firmware)
        fields |= {"boot": boot, "serial": serial, "firmware_path": firmware}
    status = run_verb(
        fields,
        disks=[*(disk or []), *([f"vdev=hdc,cdrom,target={cdrom}"] if cdrom else [])],
        vifs=[*(vif or []), *(["bridge=xenbr0"] if net else [])],
        nvme=nvme or [],
        pci=pci or [],
        until=until,
        first=input_,
        expect=expect or [],
        send=send or [],
        timeout=timeout,
        reboot=reboot,
        quiet=quiet,
        json=json_,
        json_file=json_file,
        cpus=cpus,
        join=join,
        trace=trace,
        net_host=net_host,
        vnc=vnc,
        domio=domio,
    )
    raise typer.Exit(status)


verbs_machine.add(app)
verbs_domain.add(app)
verbs_adjust.add(app)
registers.add(app)
verbs_devices.add(app)
verbs_network.add(app)
verbs_xenstore.add(app)
verbs_faults.add(app)
verbs_trace.add(app)
verbs_top.add(app)
Guest = typer.Typer(help="Bootable guests.", rich_markup_mode=None)


@Guest.command("fetch")
def guest_fetch(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="grub, debian, seabios or shim.")],
    path: Annotated[
        str, typer.Option(metavar="FILE", help="Print the path of this file alone: kernel, ramdisk.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Copy to there; a cache by default.")
    ] = None,
) -> None:
    """Get or build a bootable guest, and print the paths of its files.

    Example: domicile run "$(domicile guest fetch grub --path kernel)"
    """
    from toolstack.cli.verbs_machine import fetch

    fetch(what, path, output)


app.add_typer(Guest, name="guest")


def call(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status. MachineError, InputError."""
    try:
        result = app(args=arguments, standalone_mode=False)
    except ClickException as error:
        told = getattr(error, "format_message", None)  # click's, vendored by newer typers
        message = str(told() if callable(told) else error)
        if not message:  # no arguments: the help was asked for
            return int(getattr(error, "exit_code", 2))
        unknown = _NO_COMMAND.search(message)
        if unknown is not None and unknown[1] in NOT_BUILT:
            raise InputError(
                f"{unknown[1]}: xl has this verb; it is not built here (docs/limits.md)"
            ) from None
        context = getattr(error, "ctx", None)
        where = f"{context.command_path}: " if context is not None else ""
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        raise InputError(f"{where.removeprefix('domicile: ')}{message}{hint}") from None
    except Abort:
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else 0
