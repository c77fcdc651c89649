"""From the options of `domicile run` to a RunRequest."""

from __future__ import annotations

from typing import Any

from toolstack.cli.images import check_name, name_of
from toolstack.cli.run import Run, RunRequest
from toolstack.cli.script import ConsoleScript, compile_pattern, decode_escapes
from toolstack.domio import check_kind
from toolstack.errors import InputError

TYPES = ("pv", "pvh", "hvm")


def run_verb(
    fields: dict[str, Any],
    *,
    disks: list[str],
    vifs: list[str],
    nvme: list[str],
    pci: list[str],
    until: str,
    first: str,
    expect: list[str],
    send: list[str],
    timeout: float,
    reboot: bool,
    quiet: bool,
    json: bool,
    json_file: str,
    cpus: int,
    join: bool = False,
    trace: str = "",
    vnc: bool = False,
    net_host: str = "",
    domio: str = "native",
) -> int:
    """Check everything, then run. The exit status; InputError, MachineError."""
    if fields["type"] not in TYPES:
        raise InputError(f"--type {fields['type']}: there are {', '.join(TYPES)}")
    if fields.get("pvshim") and fields["type"] != "pvh":
        raise InputError("--pvshim: the shim is for PVH guests: add --type pvh")
    if fields["type"] != "hvm" and not fields["kernel"]:
        raise InputError(f"a kernel is missing: a {fields['type']} guest needs one (domicile run KERNEL)")
    if vnc and fields["type"] != "hvm":
        raise InputError(f"--vnc: only full HVM guests have a screen, not {fields['type']} guests")
    fields["vnc"] = vnc
    check_kind(domio, "--domio")
    if len(send) > len(expect):
        raise InputError(f"--send {send[len(expect)]!r}: has no --expect; they come in pairs")
    if len(send) < len(expect):
        raise InputError(f"--expect {expect[len(send)]!r}: has no --send; they come in pairs")
    pairs = [
        (compile_pattern(pattern, "--expect"), decode_escapes(text, "--send"))
        for pattern, text in zip(expect, send, strict=True)
    ]
    script = ConsoleScript(
        decode_escapes(first, "--input"),
        pairs,
        compile_pattern(until, "--until") if until else None,
        plain=fields["type"] == "hvm",
    )
    if disks or vifs:
        from toolstack.xlcfg.devices import parse_disk, parse_vif

        fields["disks"] = [parse_disk(text, "--disk") for text in disks]
        fields["vifs"] = [parse_vif(text, "--vif") for text in vifs]
    hardware = []
    if nvme or pci:
        from toolstack.xlcfg.pci import parse_bdf, parse_nvme

        hardware = [parse_nvme(text, "--nvme") for text in nvme]
        fields["pci"] = [parse_bdf(text, "--pci") for text in pci]
        if hardware and not pci and fields["type"] == "pv":
            raise InputError(
                "--nvme: a device can be given to PVH and HVM guests only (--type pvh); --disk is for all"
            )
    domain = {
        **fields,
        "name": check_name(fields["name"]) if fields["name"] else name_of(_first_file(fields)),
        "on_reboot": "restart" if reboot else "destroy",
    }
    from toolstack.doctor import require_quick

    if not join:
        require_quick(domain["memory_mb"])
    return Run(
        RunRequest(
            domain,
            script,
            timeout,
            hardware=hardware,
            reboot=reboot,
            quiet=quiet,
            json=json,
            json_file=json_file,
            cpus=cpus,
            join=join,
            trace=trace,
            net_host=net_host,
            domio=domio,
        )
    ).execute()


def _first_file(fields: dict[str, Any]) -> str:
    """What a guest is named after: its kernel, or the image that it boots."""
    images = [fields["kernel"], *(disk["target"] for disk in fields.get("disks", ()))]
    return next((path for path in images if path), "hvm")
