"""Tables as xl prints them."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from toolstack.xlcfg.cpus import cpus_text

Row = Mapping[str, Any]


def say(text: str = "") -> None:
    """A line on standard output."""
    print(text)


def warn(text: str) -> None:
    """A line on standard error, for what is no error."""
    print(f"domicile: {text}", file=sys.stderr, flush=True)


def colours() -> bool:
    """Whether standard output takes them."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def domain_table(rows: Iterable[Row]) -> str:
    """`xl list`."""
    lines = [f"{'Name':<40} {'ID':>5} {'Mem':>5} {'VCPUs':>5}\tState\tTime(s)"]
    lines += [
        f"{row['name']:<40} {row['domid']:>5} {row['mem_mb']:>5} {row['vcpus']:>5}     {row['state']}  {row['time_s']:>8.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def domain_json(rows: Iterable[Row]) -> str:
    """`xl list -l`: an array of {domid, config}, the latter with libxl's names."""
    return json.dumps([_long(row) for row in rows], indent=4)


def _long(row: Row) -> dict[str, Any]:
    config = row["config"]
    memory = int(config.get("memory_mb", row["mem_mb"])) << 10
    return {
        "domid": row["domid"],
        "config": {
            "c_info": {
                "type": config.get("type", "pv"),
                "name": row["name"],
                "uuid": str(uuid.UUID(hex=row["uuid"])),
            },
            "b_info": {
                "max_vcpus": config.get("maxvcpus") or config.get("vcpus", row["vcpus"]),
                "avail_vcpus": list(range(config.get("vcpus", row["vcpus"]))),
                "max_memkb": max(memory, int(config.get("maxmem_mb", 0)) << 10),
                "target_memkb": memory,
                "sched_params": {"weight": config.get("cpu_weight"), "cap": config.get("cap")},
                "kernel": config.get("kernel_path", ""),
                "ramdisk": config.get("ramdisk_path", ""),
                "cmdline": config.get("cmdline", ""),
            },
            "disks": config.get("disks", []),
            "nics": config.get("vifs", []),
            **{
                key: config[key]
                for key in ("on_poweroff", "on_reboot", "on_watchdog", "on_crash", "on_soft_reset")
                if key in config
            },
        },
        "state": row["state"],
        "cpu_time": row["time_s"],
        "memkb": row["mem_mb"] << 10,
    }


def vcpu_table(rows: Iterable[Row]) -> str:
    """`xl vcpu-list`."""
    lines = [
        f"{'Name':<32} {'ID':>5} {'VCPU':>5} {'CPU':>5} {'State':>5} {'Time(s)':>9} Affinity (Hard / Soft)"
    ]
    for row in rows:
        offline = not row["online"]
        cpu = "-" if offline else str(row["cpu"])
        state = "--p" if offline else row["state"]
        affinity = f"{cpus_text(row['hard'], row['cpus'])} / {cpus_text(row['soft'], row['cpus'])}"
        lines.append(
            f"{row['name']:<32} {row['domid']:>5} {row['vcpu']:>5} {cpu:>5}   {state} {row['time_s']:>9.1f}  {affinity}"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """As xl uptime: [D days, ] h:mm:ss."""
    whole = int(seconds)
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600:>2}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days} day{'s' if days != 1 else ''}, {text}" if days else text


def uptime_table(rows: Iterable[Row]) -> str:
    """`xl uptime`."""
    lines = [f"{'Name':<33} {'ID':>4} Uptime"]
    lines += [f"{row['name']:<33} {row['domid']:>4} {duration(row['seconds'])}" for row in rows]
    return "\n".join(lines)


def scheduler_table(rows: Iterable[Row]) -> str:
    """`xl sched-credit2`."""
    lines = [f"{'Name':<33} {'ID':>4} {'Weight':>6} {'Cap':>4}"]
    lines += [f"{row['name']:<33} {row['domid']:>4} {row['weight']:>6} {row['cap']:>4}" for row in rows]
    return "\n".join(lines)


def pairs(values: Mapping[str, Any]) -> str:
    """`xl info`: one `key : value` a line."""
    return "\n".join(f"{key:<23}: {value}" for key, value in values.items())
