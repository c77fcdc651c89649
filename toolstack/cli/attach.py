"""Being attached to a running machine: a console, or waiting for domains to end."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Final

from toolstack.cli.output import say, warn
from toolstack.cli.state import connect
from toolstack.cli.terminal import ESCAPE, RawTerminal, write_all
from toolstack.errors import InputError, MachineError, TimedOut

if TYPE_CHECKING:
    from toolstack.client import ControlClient

SHUTDOWN_CODES: Final = {"poweroff": 0, "reboot": 1, "suspend": 2, "crash": 3, "watchdog": 4, "soft_reset": 5}


def attach(domain: str, *, replay: bool, kind: str = "") -> None:
    """Keys to the guest and its output here, until ^], the end of input, or the domain's end."""
    client = connect()
    try:
        if domain in ("0", "Domain-0"):
            raise InputError("console: Domain-0 has none: `domicile dmesg` shows the hypervisor's log")
        client.request("follow")
        client.request("console", {"domain": domain, "replay": replay, "type": kind})
        name = client.request("domname", {"domain": domain})
        number = client.request("domid", {"domain": domain})
        converse(client, name, number, kind)
    finally:
        client.close()


def converse(client: ControlClient, name: str, number: int, kind: str = "") -> None:
    """With the console of a domain that the client is attached to and follows."""
    with RawTerminal() as terminal:
        poller = select.poll()
        poller.register(client.fileno(), select.POLLIN)
        poller.register(0, select.POLLIN)
        reading = True
        while True:
            while (notice := client.notice(0)) is not None:
                body = notice.body
                if notice.what == "console" and body.get("name") == name:
                    write_all(body["data"])
                elif notice.what == "ended" and body.get("domid") == number:
                    if body["reason"] != "restarted":
                        return
                    number = int(body["details"])
            for fd, _ in poller.poll():
                if fd or not reading:
                    continue
                keys = terminal.read()
                leave = terminal.active and ESCAPE in keys
                if leave:
                    keys = keys[: keys.index(ESCAPE)]
                if keys:
                    client.request("type", {"domain": name, "data": keys, "type": kind})
                if leave:
                    return
                if not keys:
                    # The end of input that is no terminal: what was typed may still be answered, so the output goes on.
                    poller.unregister(0)
                    reading = False


def ask_to_stop(
    how: str, domain: str | None, *, every: bool, wait: bool, fallback: bool, timeout: float
) -> None:
    """`xl shutdown` and `xl reboot`. TimedOut if they are not gone in time."""
    if every == (domain is not None):
        raise InputError(
            f"{'shutdown' if how == 'poweroff' else how}: give a DOMAIN, or --all for all of them"
        )
    client = connect()
    try:
        if wait:
            client.request("follow")
        rows = client.request("list")
        targets = {
            row["domid"]: row
            for row in rows
            if row["domid"]
            and ((every and row["config"]) or row["name"] == domain or str(row["domid"]) == domain)
        }
        if not targets and not every:
            if domain in ("0", "Domain-0"):
                raise InputError("not Domain-0: `domicile down` ends the machine")
            raise MachineError(f"domain {domain!r} does not exist: `domicile list` shows those that do")
        for number, row in targets.items():
            if fallback and row["config"].get("type") == "pv":
                warn(
                    f"{row['name']}: -F: a PV guest has no ACPI: it is asked through xenstore, as without -F"
                )
            say(f"{'Shutting down' if how == 'poweroff' else 'Rebooting'} domain {number}")
            client.request("shutdown", {"domain": number, "how": how, "fallback": fallback})
        if wait:
            _wait(client, set(targets), timeout)
    finally:
        client.close()


def _wait(client: ControlClient, targets: set[int], timeout: float) -> None:
    say(f"Waiting for {len(targets)} domain{'s' if len(targets) != 1 else ''}")
    deadline = time.monotonic() + timeout
    while targets:
        left = deadline - time.monotonic()
        notice = client.notice(left) if left > 0 else None
        if notice is None and deadline - time.monotonic() <= 0:
            names = ", ".join(str(number) for number in sorted(targets))
            raise TimedOut(f"domain {names}: still there after {timeout:g} s: `domicile destroy` ends it")
        if notice is not None and notice.what == "ended" and notice.body["domid"] in targets:
            targets.discard(notice.body["domid"])
            reason = notice.body["reason"]
            code = SHUTDOWN_CODES.get(reason)
            detail = f"reason code {code}" if code is not None else reason
            say(f"Domain {notice.body['domid']} has been shut down, {detail}")
