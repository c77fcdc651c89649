"""CONTROL: the commands that domain 0 may give to the daemon. Answers are text.

help, check, print|<text>, memreport, quota, quota|<domid>, quota|set|<name>|<value>.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bus.abi.io.xs_wire import XENSTORE_PAYLOAD_MAX
from domains.dom0.xenstore.effects import Log
from domains.dom0.xenstore.errors import XsError
from domains.dom0.xenstore.quota import QUOTA_MAX, QUOTA_NAMES

if TYPE_CHECKING:
    from domains.dom0.xenstore.core import Core


def run(core: Core, command: bytes, arguments: list[bytes]) -> bytes:
    """The answer to a command. XsError EINVAL (unknown, or wrong arguments), ENOENT (no such domain)."""
    name = command.decode("ascii", "replace")
    words = [argument.decode("ascii", "replace") for argument in arguments]
    match name, words:
        case "help", []:
            answer = "check\nhelp\nmemreport\nprint|<text>\nquota[|<domid>|set|<name>|<value>]"
        case "check", []:
            wrong = core.store.check()
            for line in wrong[:16]:
                core.emit(Log(f"xenstore check: {line}"))
            if wrong:
                raise XsError("EIO")
            answer = "OK"
        case "print", [text]:
            core.emit(Log(text))
            answer = "OK"
        case "memreport", []:
            answer = _memory(core)
        case "quota", []:
            answer = "".join(f"{quota:<18}: {getattr(core.quota, quota):8}\n" for quota in QUOTA_NAMES)
        case "quota", ["set", quota, value]:
            _set_quota(core, quota, value)
            answer = "OK"
        case "quota", [domid]:
            answer = _usage(core, domid)
        case _:
            raise XsError("EINVAL")
    return answer.encode()[: XENSTORE_PAYLOAD_MAX - 1] + b"\0"


def _set_quota(core: Core, name: str, value: str) -> None:
    if (
        name not in QUOTA_NAMES
        or not (value.isascii() and value.isdigit())
        or not 0 < int(value[:12]) < QUOTA_MAX
    ):
        raise XsError("EINVAL")
    setattr(core.quota, name, int(value[:12]))


def _usage(core: Core, text: str) -> str:
    if not (text.isascii() and text.isdigit()) or len(text) > 5:
        raise XsError("EINVAL")
    domid = int(text)
    usage = core.domain_usage(domid)
    if usage is None:
        raise XsError("ENOENT")
    return f"Domain {domid}:\n" + "".join(f"{name:<16}: {value:8}\n" for name, value in usage.items())


def _memory(core: Core) -> str:
    store = core.store
    lines = [f"nodes: {len(store.nodes)}", f"bytes: {sum(store.usage.memory.values())}"]
    lines += [f"connections: {len(core.connections)}", f"transactions: {core.open_transactions}"]
    return "\n".join(lines) + "\n"
