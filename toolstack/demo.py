"""`./devtool demo`: boots GRUB for Xen on a machine of processes, talks to it, and says what happens."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from toolstack.errors import MachineError

GRUB_TIMEOUT_S = 30.0


def main() -> None:
    """Exit status 1 if a step failed."""
    start = time.monotonic()

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - start:6.2f} s] {text}", flush=True)

    try:
        tell("getting GRUB for Xen (Debian's grub-xen-bin) ...")
        kernel = _grub()
        tell(f"it is {kernel}")
        _boot(kernel, tell)
    except MachineError as error:
        tell(f"FAILED: {error}")
        sys.exit(1)
    tell("done: every process of the machine is gone")


def _grub() -> str:
    from toolstack.guestfetch import FetchError, fetch

    try:
        return str(fetch("grub").kernel)
    except FetchError as error:
        raise MachineError(str(error)) from None


def _boot(kernel: str, tell: Any) -> None:
    from toolstack.cli.images import Images, make_config
    from toolstack.machine import Machine

    with Machine("demo") as machine, Images() as images:
        client = machine.client
        tell(
            "the machine is up: these processes, each of which may be killed without harm to the others' memory:"
        )
        for line in _processes(machine.runtime.name):
            tell(f"    {line}")
        config = make_config({"name": "grub", "kernel": kernel, "memory_mb": 128}, images)
        client.request("create", {"config": config, "attach": True}, images.descriptors)
        tell("domain 1 is built and runs; its console, through ring page and event channel:")
        _expect(client, b"grub>", tell)
        client.request("type", {"domain": "grub", "data": b"echo Hello from a guest of processes\r"})
        _expect(client, b"grub>", tell)
        for row in client.request("list"):
            tell(
                f"    {row['name']:<10} id {row['domid']}  {row['mem_mb']} MB  {row['state']}  {row['time_s']:.1f} s"
            )
        client.request("type", {"domain": "grub", "data": b"halt\r"})
        tell("`halt` typed; the domain ends:")
        deadline = time.monotonic() + GRUB_TIMEOUT_S
        while (notice := client.notice(deadline - time.monotonic())) is not None:
            if notice.what == "ended":
                tell(f"    domain {notice.body['domid']} ended: {notice.body['reason']}")
                return
        raise MachineError(f"the guest did not end within {GRUB_TIMEOUT_S:.0f} s")


def _expect(client: Any, wanted: bytes, tell: Any) -> None:
    seen = b""
    deadline = time.monotonic() + GRUB_TIMEOUT_S
    while wanted not in seen:
        notice = client.notice(max(0.01, deadline - time.monotonic()))
        if notice is None:
            raise MachineError(f"{wanted.decode()!r} was not seen within {GRUB_TIMEOUT_S:.0f} s")
        if notice.what == "ended":
            raise MachineError(f"the domain ended: {notice.body['reason']} {notice.body['details']}")
        seen += notice.body.get("data", b"")
    for line in _plain(seen).splitlines():
        if line.strip():
            tell(f"    | {line.rstrip()}")


def _plain(data: bytes) -> str:
    import re

    return re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]|[^\n\x20-\x7e]", b"", data).decode("ascii")


def _processes(machine: str) -> list[str]:
    """This machine's processes, as the host sees them: the warden's, and its children."""
    warden, rows = None, []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
            role = next((word for word in words if word.startswith(b"domicile-")), None)
            if role is None:
                continue
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            uid = os.stat(f"/proc/{name}").st_uid
            if role == b"domicile-warden" and machine.encode() in words:
                warden = int(name)
            rows.append((int(name), parent, uid, role.decode()))
    return [
        f"{role:<22} process {pid:<8} uid {uid}"
        for pid, parent, uid, role in sorted(rows)
        if warden is not None and warden in (pid, parent)
    ]


if __name__ == "__main__":
    main()
