"""Verbs about devices: block-attach, block-list, block-detach; device-plug, device-unplug, pci-list, pci-assignable-list; iommu."""

from __future__ import annotations

import json as json_module
import os
import re
from typing import Annotated, Any, Final

import typer

from toolstack.cli.output import say
from toolstack.cli.state import ask, connect
from toolstack.errors import InputError

Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="Name or id.")]
BDF: Final = re.compile(r"(?:([0-9a-fA-F]{4}):)?([0-9a-fA-F]{2}):([01][0-9a-fA-F])\.([0-7])")
STEPS: Final = {"table": "table at frame", "leaf": "memory at frame"}


def add(app: typer.Typer) -> None:
    """Put the verbs into the command."""
    app.command("block-attach")(block_attach)
    app.command("block-list")(block_list)
    app.command("block-detach")(block_detach)
    app.command("device-plug")(device_plug)
    app.command("device-unplug")(device_unplug)
    app.command("pci-list")(pci_list)
    app.command("pci-assignable-list")(pci_assignable_list)
    app.command("iommu")(iommu)


def block_attach(
    domain: Domain,
    spec: Annotated[list[str], typer.Argument(metavar="DISKSPEC...", help="As in xl-disk-configuration.")],
) -> None:
    """Give a running guest a disk. Example: domicile block-attach web data.img,raw,xvdb,w"""
    from toolstack.cli.images import elsewhere, open_image
    from toolstack.xlcfg.devices import parse_disk

    disk = parse_disk(",".join(spec), "block-attach")
    fds = (
        [open_image(disk["target"], "disk", writable=not disk["readonly"])]
        if disk["target"] and not elsewhere(disk)
        else []
    )
    try:
        client = connect()
        try:
            client.request("block-attach", {"domain": domain, "disk": disk}, fds)
        finally:
            client.close()
    finally:
        for fd in fds:
            os.close(fd)


def block_list(
    domain: Annotated[list[str], typer.Argument(metavar="DOMAIN...", help="Name or id.")],
) -> None:
    """Virtual disks of guests. Example: domicile block-list web db"""
    rows = [row for name in domain for row in ask("block-list", domain=name)]
    say(block_table(rows))


def block_detach(
    domain: Domain,
    device: Annotated[str, typer.Argument(metavar="DEVID", help="Its name (xvdb) or number.")],
    force: Annotated[bool, typer.Option("--force", help="Even if the guest does not let go of it.")] = False,
) -> None:
    """Take a disk away from a running guest. Example: domicile block-detach web xvdb"""
    ask("block-detach", domain=domain, vdev=device, force=force)


def block_table(rows: list[dict[str, Any]]) -> str:
    """`xl block-list`."""
    head = f"{'Vdev':<5} {'BE':<3} {'handle':<6} {'state':<5} {'evt-ch':<6} {'ring-ref':<8} {'BE-path':<30}"
    return "\n".join(
        [
            head,
            *(
                f"{row['vdev']:<5} {row['backend_id']:<3} {row['handle']:<6} {row['state']:<5} "
                f"{row['event_channel']:<6} {row['ring_ref']:<8} {row['path']:<30}"
                for row in rows
            ),
        ]
    )


def device_plug(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="What it is: nvme.")],
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="FILE[,raw|qcow2][,r|w][,bdf=BUS:DEV.FN]")],
) -> None:
    """Plug a device into the machine, for a guest to own (pci= in its file). Its PCI address is printed.

    Example: domicile device-plug nvme disk.img,raw,w,bdf=01:00.0
    """
    from toolstack.cli.images import open_image
    from toolstack.xlcfg.pci import parse_nvme

    config = parse_nvme(spec, "device-plug")
    fd = open_image(config["target"], "disk", writable=not config["readonly"])
    try:
        client = connect()
        try:
            arguments = {"kind": kind, "config": config, "bdf": config.pop("bdf")}
            say(bdf_text(client.request("device-plug", arguments, [fd])))
        finally:
            client.close()
    finally:
        os.close(fd)


def device_unplug(
    bdf: Annotated[str, typer.Argument(metavar="BDF", help="Its PCI address.")],
) -> None:
    """Pull a device out that no guest has. Example: domicile device-unplug 0000:00:02.0"""
    from toolstack.xlcfg.pci import parse_bdf

    ask("device-unplug", bdf=parse_bdf(bdf, "device-unplug"))


def pci_list(domain: Domain) -> None:
    """PCI devices that a guest has. Example: domicile pci-list web"""
    rows = ask("pci-list", domain=domain)
    say(
        "\n".join(
            [
                "Vdev Device",
                *(f"{row['bdf'] >> 3 & 31:02x}.{row['bdf'] & 7} {bdf_text(row['bdf'])}" for row in rows),
            ]
        )
    )


def pci_assignable_list() -> None:
    """PCI devices that no guest has, and that can be given to one. Example: domicile pci-assignable-list"""
    for row in ask("pci-list"):
        if row["domid"] is None:
            say(bdf_text(row["bdf"]))


def iommu(
    what: Annotated[
        str, typer.Argument(metavar="[DOMAIN|BDF]", help="A domain, or a device such as 0000:00:01.0.")
    ] = "",
    walk: Annotated[
        str,
        typer.Option(metavar="IOVA", help="Show the path of this I/O virtual address through the tables."),
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """The IOMMU: who owns which device, I/O page tables, I/O TLB, recent faults. Example: domicile iommu DomIO --walk 0x1000"""
    arguments: dict[str, Any] = {}
    found = BDF.fullmatch(what)
    if found is not None:
        segment, bus, device, function = (int(word or "0", 16) for word in found.groups())
        arguments["bdf"] = segment << 16 | bus << 8 | device << 3 | function
    elif what:
        arguments["domain"] = what
    if walk:
        try:
            arguments["iova"] = int(walk, 0)
        except ValueError:
            raise InputError(f"--walk {walk}: a number, such as 0x1000") from None
        if not 0 <= arguments["iova"] < 1 << 64:
            raise InputError(f"--walk {walk}: an address has 64 bits")
        if not what:
            raise InputError("--walk: say whose address it is: a domain or a device")
    view = ask("iommu", **arguments)
    say(json_module.dumps(view) if json else iommu_text(view))


def bdf_text(bdf: int) -> str:
    """0000:00:01.0"""
    return f"{bdf >> 16 & 0xFFFF:04x}:{bdf >> 8 & 0xFF:02x}:{bdf >> 3 & 31:02x}.{bdf & 7}"


def iommu_text(view: dict[str, Any]) -> str:
    """Tables for people."""
    names = dict(view["names"])
    lines = [
        f"{'Device':<13} {'Owner':<20} {'Epoch':>5} {'Requests':>9} {'Read':>12} {'Written':>12} {'Intrs':>8} Vectors"
    ]
    for row in view["devices"]:
        owner = "none" if row["domain"] is None else f"d{row['domain']} {names.get(row['domain'], '')}"
        vectors = " ".join(f"{entry}->{index}" for entry, index in row["vectors"]) or "-"
        lines.append(
            f"{bdf_text(row['bdf']):<13} {owner:<20} {row['epoch']:>5} {row['requests']:>9} {row['bytes_read']:>12}"
            f" {row['bytes_written']:>12} {row['interrupts']:>8} {vectors}"
        )
    lines += [
        f"d{row['domain']} {names.get(row['domain'], '')}: {row['tables']} tables; leaves: {row['leaves_4k']} of 4 KiB, "
        f"{row['leaves_2m']} of 2 MiB, {row['leaves_1g']} of 1 GiB; {row['tlb_entries']} in the I/O TLB"
        for row in view["domains"]
    ]
    tlb = view["tlb"]
    lines.append(
        f"I/O TLB: {tlb['size']} of {tlb['capacity']} entries, {tlb['hits']} hits, {tlb['misses']} misses, "
        f"{tlb['invalidations']} invalidations, {tlb['evictions']} evictions"
    )
    if "walk" in view:
        lines += walk_lines(view["walk"])
    lines.append(
        f"Faults: {view['faults_total']} in all, {view['faults_suppressed']} not recorded (rate limit)"
    )
    lines += [f"  {row['time_ns'] / 1e9:.6f} {row['text']}" for row in view["faults"]]
    return "\n".join(lines)


def walk_lines(walk: dict[str, Any]) -> list[str]:
    """The path of an address, level by level."""
    iova = walk["iova"]
    lines = [
        f"I/O virtual address {iova:#x} of d{walk['domain']} (page {iova >> 12:#x}, offset {iova & 0xFFF:#x}):"
    ]
    for step in walk["steps"]:
        frame = (step["entry"] & 0x000F_FFFF_FFFF_F000) >> 12
        rights = ("r" if step["entry"] & 1 else "-") + ("w" if step["entry"] & 2 else "-")
        where = f"{STEPS[step['kind']]} {frame:#x} {rights}" if step["kind"] in STEPS else step["kind"]
        lines.append(
            f"  level {step['level']}: table {step['table']:#x} slot {step['slot']:>3}: {step['entry']:#018x} {where}"
        )
    if walk["mfn"] is None:
        lines.append("  -> not mapped: the device gets a fault")
    else:
        address = walk["mfn"] << 12 | iova & 0xFFF
        rights = "read and write" if walk["writable"] else "read only"
        cached = "in the I/O TLB" if walk["cached"] else "not in the I/O TLB"
        lines.append(f"  -> machine address {address:#x} ({rights}; {cached})")
    return lines
