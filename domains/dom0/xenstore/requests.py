"""The requests of xs_wire.h: payload in, reply payload out. Each handler raises XsError for what it refuses.

A handler gets the core, the connection, the transaction that the header names (None: the committed tree)
and the message. It returns the reply's payload, or None if the reply comes later.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from bus.abi.io import xs_wire
from bus.abi.io.xs_wire import XENSTORE_PAYLOAD_MAX, XENSTORE_REL_PATH_MAX
from bus.abi.xen import DOMID_FIRST_RESERVED, DOMID_SELF
from domains.dom0.xenstore import control, operations, paths, perms
from domains.dom0.xenstore.connections import Connection
from domains.dom0.xenstore.effects import AttachRing
from domains.dom0.xenstore.errors import XsError
from domains.dom0.xenstore.store import View
from domains.dom0.xenstore.transaction import Transaction
from drivers.xenbus.wire import Message, split_strings

if TYPE_CHECKING:
    from domains.dom0.xenstore.core import Core

OK: Final = b"OK\0"
_NUMBER: Final = re.compile(rb"-?[0-9]{1,20}")


def _one(payload: bytes) -> bytes:
    """The payload's only string: exactly one nul, at the end. XsError EINVAL."""
    if payload.find(b"\0") != len(payload) - 1 or not payload:
        raise XsError("EINVAL")
    return payload[:-1]


def _strings(payload: bytes, least: int) -> list[bytes]:
    found = split_strings(payload)
    if len(found) < least:
        raise XsError("EINVAL")
    return found


def _number(text: bytes) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise XsError("EINVAL")
    return int(text)


def _domid(text: bytes) -> int:
    number = _number(text)
    if not 0 <= number <= perms.DOMID_MAX:
        raise XsError("EINVAL")
    return number


def _path(core: Core, conn: Connection, text: bytes) -> bytes:
    path = paths.canonical(text, conn.base)
    if conn.domain.domid != 0 and len(path) > core.quota.path_length:
        raise XsError("EINVAL")
    return path


def _view(core: Core, tx: Transaction | None) -> View:
    return core.store if tx is None else tx


def _directory(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    path = _path(core, conn, _one(message.payload))
    node = operations.read(_view(core, tx), core.caller(conn, tx), path)
    if node.children_size > XENSTORE_PAYLOAD_MAX:
        raise XsError("E2BIG")
    return b"".join([name + b"\0" for name in node.children])


def _directory_part(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    found = split_strings(message.payload)
    if len(found) != 2:
        raise XsError("EINVAL")
    node = operations.read(_view(core, tx), core.caller(conn, tx), _path(core, conn, found[0]))
    offset = _number(found[1])
    if offset < 0:
        raise XsError("EINVAL")
    generation = b"%d\0" % node.generation
    if offset >= node.children_size:
        return generation + b"\0"
    rest = b"".join([name + b"\0" for name in node.children])[offset:]
    room = XENSTORE_PAYLOAD_MAX - len(generation) - 1
    if len(rest) <= room:
        return generation + rest + b"\0"
    return generation + rest[: rest.rindex(b"\0", 0, room) + 1]


def _read(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    path = _path(core, conn, _one(message.payload))
    return operations.read(_view(core, tx), core.caller(conn, tx), path).value


def _get_perms(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    name = _one(message.payload)
    if name.startswith(b"@"):
        listed = core.special_perms(conn, name)
    else:
        listed = operations.read(_view(core, tx), core.caller(conn, tx), _path(core, conn, name)).perms
    return b"".join([perms.to_text(perm) + b"\0" for perm in listed])


def _set_perms(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    name, *texts = _strings(message.payload, 2)
    who = core.caller(conn, tx)
    if who.limits is not None and len(texts) > who.limits.permissions:
        raise XsError("ENOSPC")
    parsed = [perms.parse(text) for text in texts]
    if not core.domain_exists(parsed[0].domid):
        raise XsError("ENOENT")
    # An entry for a domain that does not exist would be inherited by whoever gets the number next (XSA-322).
    listed = (parsed[0], *(perm for perm in parsed[1:] if core.domain_exists(perm.domid)))
    if name.startswith(b"@"):
        core.special_perms(conn, name)
        if conn.domain.domid != 0:
            raise XsError("EACCES")
        core.store.special[name] = listed
        return OK
    core.note(tx, operations.set_perms(_view(core, tx), who, _path(core, conn, name), listed))
    return OK


def _write(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    end = message.payload.find(b"\0")
    if end < 0:
        raise XsError("EINVAL")
    path = _path(core, conn, message.payload[:end])
    value = message.payload[end + 1 :]
    core.note(tx, operations.write(_view(core, tx), core.caller(conn, tx), path, value))
    return OK


def _mkdir(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    path = _path(core, conn, _one(message.payload))
    core.note(tx, operations.mkdir(_view(core, tx), core.caller(conn, tx), path))
    return OK


def _rm(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    path = _path(core, conn, _one(message.payload))
    core.note(tx, operations.remove(_view(core, tx), core.caller(conn, tx), path))
    return OK


def _watch_path(core: Core, conn: Connection, name: bytes) -> tuple[bytes, int]:
    """(what is watched, how many bytes of an event's path are cut off)."""
    if name.startswith(b"@"):
        if len(name) > XENSTORE_REL_PATH_MAX:
            raise XsError("EINVAL")
        return name, 0
    return _path(core, conn, name), 0 if name.startswith(b"/") else len(conn.base) + 1


def _watch(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    name, token, *_ = _strings(message.payload, 2)
    path, prefix = _watch_path(core, conn, name)
    core.add_watch(conn, path, token, prefix)
    return OK


def _unwatch(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    name, token, *_ = _strings(message.payload, 2)
    core.remove_watch(conn, _watch_path(core, conn, name)[0], token)
    return OK


def _reset_watches(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    core.drop_watches(conn)
    core.drop_transactions(conn)
    return OK


def _transaction_start(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    if tx is not None:
        raise XsError("EBUSY")
    return b"%d\0" % core.start_transaction(conn)


def _transaction_end(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    verdict = _one(message.payload)
    if verdict not in (b"T", b"F"):
        raise XsError("EINVAL")
    if tx is None:
        raise XsError("ENOENT")
    core.end_transaction(conn, tx, commit=verdict == b"T")
    return OK


def _introduce(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> None:
    found = _strings(message.payload, 3)
    domid, gfn, port = _domid(found[0]), _number(found[1]), _number(found[2])
    if domid >= DOMID_FIRST_RESERVED or not 0 < port < 1 << 32:
        raise XsError("EINVAL")
    core.ask_introduction(conn, message, AttachRing(domid, gfn, port))


def _introduced(core: Core, message: Message) -> int:
    """The domain that a request of domain 0 names: introduced, and not domain 0. XsError EINVAL, ENOENT."""
    domid = _domid(_one(message.payload))
    if domid == 0:
        raise XsError("EINVAL")
    if not core.is_introduced(domid):
        raise XsError("ENOENT")
    return domid


def _release(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    core.forget(_introduced(core, message))
    return OK


def _resume(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    core.domain(_introduced(core, message)).shutdown = False
    return OK


def _set_target(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    found = _strings(message.payload, 2)
    domid, target = _domid(found[0]), _domid(found[1])
    if not core.is_introduced(domid) or not core.is_introduced(target):
        raise XsError("ENOENT")
    core.domain(domid).target = target
    return OK


def _get_domain_path(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    return paths.home(_domid(_one(message.payload))) + b"\0"


def _is_domain_introduced(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    domid = _domid(_one(message.payload))
    return b"T\0" if domid == DOMID_SELF or core.is_introduced(domid) else b"F\0"


def _control(core: Core, conn: Connection, tx: Transaction | None, message: Message) -> bytes:
    command, *arguments = _strings(message.payload, 1)
    return control.run(core, command, arguments)


class Entry(NamedTuple):
    """How a request is served."""

    serve: Callable[[Core, Connection, Transaction | None, Message], bytes | None]
    privileged: bool = False
    """Domain 0 only; others get EACCES."""
    ignores_transaction: bool = False
    """The header's tx_id is not looked at."""


REQUESTS: Final[dict[int, Entry]] = {
    xs_wire.XS_CONTROL: Entry(_control, privileged=True),
    xs_wire.XS_DIRECTORY: Entry(_directory),
    xs_wire.XS_READ: Entry(_read),
    xs_wire.XS_GET_PERMS: Entry(_get_perms),
    xs_wire.XS_WATCH: Entry(_watch, ignores_transaction=True),
    xs_wire.XS_UNWATCH: Entry(_unwatch, ignores_transaction=True),
    xs_wire.XS_TRANSACTION_START: Entry(_transaction_start),
    xs_wire.XS_TRANSACTION_END: Entry(_transaction_end),
    xs_wire.XS_INTRODUCE: Entry(_introduce, privileged=True),
    xs_wire.XS_RELEASE: Entry(_release, privileged=True),
    xs_wire.XS_GET_DOMAIN_PATH: Entry(_get_domain_path),
    xs_wire.XS_WRITE: Entry(_write),
    xs_wire.XS_MKDIR: Entry(_mkdir),
    xs_wire.XS_RM: Entry(_rm),
    xs_wire.XS_SET_PERMS: Entry(_set_perms),
    xs_wire.XS_IS_DOMAIN_INTRODUCED: Entry(_is_domain_introduced, privileged=True),
    xs_wire.XS_RESUME: Entry(_resume, privileged=True),
    xs_wire.XS_SET_TARGET: Entry(_set_target, privileged=True),
    xs_wire.XS_RESET_WATCHES: Entry(_reset_watches),
    xs_wire.XS_DIRECTORY_PART: Entry(_directory_part),
}
"""Every request. A type that is not here (WATCH_EVENT, ERROR, unknown numbers) gets ENOSYS."""
