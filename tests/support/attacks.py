"""What hostile domain processes do (`tests.support.hostile` runs them), each to its end and then on to obedience."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from functools import partial

import zmq

from bus.abi import event_channel as ec
from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi import sched, xen
from bus.abi.hypercalls import HYPERCALLS
from bus.abi.hypercalls_model import Command, Privilege
from bus.messages.device import DeviceAccess, Plug
from bus.messages.domain import Hello, Hypercall, Order, OrderDone, Report
from bus.messages.envelope import encode
from bus.packets import close_all
from bus.sealed import F_ADD_SEALS
from tests.support import attacks_shell
from tests.support.attacks_grants import grantee, granter
from tests.support.hostile import Answer, Hostile, outcome
from tests.support.raw_zmtp import GREETING, RawClient, connect, frame

FATAL = {
    (xen.HYPERVISOR_sched_op, sched.SCHEDOP_shutdown),
    (xen.HYPERVISOR_sched_op, sched.SCHEDOP_shutdown_code),
    (xen.HYPERVISOR_sched_op, sched.SCHEDOP_watchdog),
}
"""Calls by which a domain ends itself, which proves nothing."""
STATUS = ec.EVTCHN_STATUS.pack(ec.EVTCHN_STATUS.zero()._replace(dom=xen.DOMID_SELF))
HARMLESS = Hypercall(token=1, vcpu=0, nr=xen.HYPERVISOR_event_channel_op, cmd=ec.EVTCHNOP_status, data=STATUS)


def alive(h: Hostile) -> int:
    """An honest call after all that; its return value. What was refused before is forgotten."""
    for token in range(1 << 40, (1 << 40) + 10):  # one that is sent while the link is opened again is lost
        h.send_call(token, xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_status, STATUS)
        if h.serve(1.0, lambda token=token: token in h.replies):  # type: ignore[misc]  # a default binds the loop's value
            return h.replies[token][0]
    return -1


def obedient(h: Hostile) -> None:
    """No attack: shows that the harness itself is a domain's process like another."""
    h.connect()
    h.started()
    h.say("done", rc=alive(h))
    h.idle()


# ---------------------------------------------------------------------------- messages


def flood(h: Hostile, read: bool) -> None:
    """Calls as fast as they go for two seconds, with or without reading the answers."""
    h.connect()
    h.started()
    raw, sent, deadline = encode(HARMLESS), 0, time.monotonic() + 2.0
    h.say("begun")
    while time.monotonic() < deadline:
        try:
            h.link._socket.send(raw, zmq.NOBLOCK)
            sent += 1
        except zmq.Again:
            h.link._socket.poll(10, zmq.POLLOUT)
        if read and not sent % 16:
            h.link.dispatch()
    h.say("done", sent=sent, rc=alive(h) if read else 0)
    h.idle()


def malformed(h: Hostile) -> None:
    """Bytes that are no message, and messages that do not validate."""
    h.connect()
    h.started()
    dice = random.Random(1)
    good = encode(HARMLESS)
    bad = [
        b"",
        b"\xc1",
        b"\x93\x01",
        b"\x93\x02" + good[2:],
        b"\x93\xff" + good[2:],
        b"\x90",
        b"\xdf\xff\xff\xff\xff",
    ]
    bad += [dice.randbytes(dice.randrange(300)) for _ in range(300)]
    for _ in range(300):
        broken = bytearray(good)
        for _ in range(dice.randrange(1, 4)):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        bad.append(bytes(broken))
    bad += [
        b"\x91" * 50000,
        b"\x81\xa1a" * 20000,
        b"\xdd\x00\x00\x10\x00" + b"\xc0" * 4096,
        b"\xc6\x00\x00\xf0\x00" + bytes(61440),
    ]
    bad += [bytes(64 * 1024), good[:-1], good + b"x"]
    for number, raw in enumerate(bad):
        h.send_raw(raw)
        if not number % 20:
            h.link.dispatch()
    h.serve(1.0, lambda: h.link.refused > 300)
    h.say("done", sent=len(bad), rc=alive(h), refused=h.link.refused)
    h.idle()


def multipart(h: Hostile) -> None:
    """Messages of many frames, and then one that never ends, for a second."""
    h.connect()
    h.started()
    for _ in range(20):
        h.link._socket.send_multipart([b"x" * 100] * 200)
        h.link.dispatch()
    count, deadline = 0, time.monotonic() + 2.0
    while time.monotonic() < deadline:  # the ordinary link opens again meanwhile, and the newer one is served
        client = RawClient(h.keys)
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                client.socket.sendall(client.message(b"x" * 60000, more=True))
                count += 1
        client.close()
    h.say("endless", parts=count)
    for body in (bytes(64 * 1024 + 200), bytes(10 << 20)):
        client = RawClient(h.keys)
        with contextlib.suppress(OSError):
            client.socket.sendall(frame(b"\x07MESSAGE" + body))
        h.say("oversized", closed=client.closed())
        client.close()
    client = RawClient(h.keys)  # announces 2^63 bytes
    client.socket.sendall(b"\x02" + (1 << 63).to_bytes(8, "big"))
    h.say("oversized", closed=client.closed())
    client.close()
    h.say("done", rc=alive(h))
    h.idle()


def connections(h: Hostile) -> None:
    """Hundreds of connections: silent, half a greeting, a greeting, greeting and HELLO, garbage; all kept open."""
    h.connect()
    h.started()
    hello = RawClient(h.keys)
    starts = [
        b"",
        GREETING[:20],
        GREETING,
        hello.hello,
        os.urandom(500),
        b"GET / HTTP/1.1\r\n\r\n",
        hello.hello + hello.initiate,
    ]
    hello.close()
    held: list[socket.socket] = []
    deadline = time.monotonic() + 3.0
    while len(held) < 400 and time.monotonic() < deadline:
        try:
            sock = connect(h.keys.endpoint, 0.2)
            held.append(sock)
            sock.sendall(starts[len(held) % len(starts)])
        except OSError:
            continue
    h.say("done", held=len(held), rc=alive(h))
    for sock in held:
        sock.close()
    h.idle()


def replay(h: Hostile) -> None:
    """A recorded handshake, and a recorded message, sent again; a handshake with other keys."""
    h.connect()
    h.started()
    first = RawClient(h.keys)
    once = first.message(encode(HARMLESS))
    first.socket.sendall(once)
    first.socket.sendall(once)
    h.say("replayed", what_of="message", closed=first.closed())
    first.close()
    again = connect(h.keys.endpoint)
    again.sendall(first.hello + first.initiate + once)
    closed = True
    try:
        while again.recv(65536):
            pass
    except TimeoutError:
        closed = False
    except OSError:
        pass
    h.say("replayed", what_of="handshake", closed=closed)
    again.close()
    stranger = h.keys.model_copy(update={"secret": h.keys.public})
    try:
        RawClient(stranger).close()
        h.say("replayed", what_of="wrong key", closed=False)
    except OSError:
        h.say("replayed", what_of="wrong key", closed=True)
    h.say("done", rc=alive(h))
    h.idle()


def forged(h: Hostile) -> None:
    """Answers to orders of others, hellos of others, reports, what only a control domain may send."""
    h.connect()
    h.started()
    for number in range(1, 3000):
        h.send(OrderDone(order=number, rc=0, data=b"\0" * 16))
    for role in ("dom0", "hypervisor", "domio"):
        h.send(Hello(pid=1, role=role))
    for number in range(200):
        h.send(Report(what="failed", body={"domain": 0, "n": number}))
        h.send(Report(what="log", body={"text": "(XEN) invariants: 9 problems, " + "x" * 300}))
    for token in range(100, 103):
        h.send(Plug(token=token, bdf=8, role="nvme", name="x"))
    for token in range(103, 106):
        h.send(DeviceAccess(token=token, bdf=8, space=-1, offset=0, size=4, write=False))
    h.serve(3.0, lambda: all(token in h.replies for token in range(100, 106)))
    answers = [h.replies.get(token, (1, b"")) for token in range(100, 106)]
    h.say(
        "done",
        rc=alive(h),
        plug=[rc for rc, _ in answers[:3]],
        registers=[data.hex() for _, data in answers[3:]],
    )
    h.idle()


# ---------------------------------------------------------------------------- orders


def garbage_answers(h: Hostile) -> None:
    """Each order is answered with random numbers and bytes, some twice."""
    dice = random.Random(2)

    def answer(order: Order, fds: list[int]) -> Answer:
        close_all(fds)
        if order.order and dice.random() < 0.3:
            h.link.answer(order, 0, dice.randbytes(7))
        return dice.choice((0, 1, -1, -4095, 1 << 62, -(1 << 63))), dice.randbytes(dice.randrange(200))

    h.on["*"] = answer
    h.connect()
    h.say("done", rc=0)
    h.idle()


def silent(h: Hostile, *whats: str) -> None:
    """Some orders are never answered."""

    def answer(order: Order, fds: list[int]) -> None:
        close_all(fds)
        h.say("silent", order=order.what, time=time.monotonic())

    for what in whats:
        h.on[what] = answer
    h.connect()
    h.idle()


def dies(h: Hostile, point: str) -> None:
    """Killed at a point of its life."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "before-hello":
        die()
    h.on[point] = die
    h.connect()
    if point == "after-hello":
        h.link._socket.poll(200)
        die()
    h.started()
    if point == "half-message":
        client = RawClient(h.keys)
        client.socket.sendall(client.message(encode(HARMLESS))[:-5])
        die()
    if point == "in-a-call":
        for token in range(50):
            h.send_call(token, xen.HYPERVISOR_sched_op, sched.SCHEDOP_yield, b"")
            request = mem.xen_memory_reservation(0, 64, 0, 0, xen.DOMID_SELF)
            data = mem.XEN_MEMORY_RESERVATION.pack(request) + bytes(512)
            h.send_call(token, xen.HYPERVISOR_memory_op, mem.XENMEM_increase_reservation, data)
        h.link._socket.poll(50)
        die()
    h.idle()


# ---------------------------------------------------------------------------- hypercalls


def shapes(command: Command, dice: random.Random) -> list[bytes]:
    """Data for a command: none, too short, the right size with random bytes, with small numbers, too long."""
    size = command.argument.size if command.argument is not None else 0
    small = b"".join(
        dice.choice((0, 0, 1, 2, 0x7FF0, 0xFFFF)).to_bytes(4, "little") for _ in range(size // 4 + 1)
    )
    return [
        b"",
        dice.randbytes(max(0, size - 1)),
        dice.randbytes(size),
        small[:size],
        dice.randbytes(size + dice.randrange(2000)),
    ]


def every_hypercall(h: Hostile) -> None:
    """Every entry of the table of hypercalls, and commands that are none, with all kinds of data."""
    h.connect()
    h.started()
    dice, token, sent = random.Random(3), 1 << 32, dict[int, tuple[str, bool]]()
    for hypercall in HYPERCALLS.values():
        for command in (*hypercall.commands, None):
            number = command.number if command is not None else dice.randrange(1 << 32)
            if (hypercall.number, number) in FATAL:
                continue
            for data in shapes(command, dice) if command is not None else [b"", dice.randbytes(64)]:
                token += 1
                control = command is not None and command.privilege is Privilege.CONTROL
                sent[token] = (
                    command.name if command is not None else f"{hypercall.name}.{number:#x}",
                    control,
                )
                h.send(
                    Hypercall(
                        token=token,
                        vcpu=dice.choice((0, 0, 1, 127)),
                        nr=hypercall.number,
                        cmd=number,
                        data=data,
                    )
                )
            h.link.dispatch()
    h.serve(5.0, lambda: len(h.replies) >= len(sent))
    breached = sorted(
        {name for t, (name, control) in sent.items() if control and h.replies.get(t, (-1,))[0] >= 0}
    )
    h.say("done", rc=alive(h), sent=len(sent), answered=len(h.replies), breached=breached)
    h.idle()


def others(h: Hostile) -> None:
    """Frames, ports and grants of Dom0 (0) and of the neighbour (1), named in well-formed calls. `taken` must stay empty."""
    h.connect()
    h.started()
    taken: list[str] = []

    def expect_refused(what: str, rc: int) -> None:
        if rc >= 0:
            taken.append(f"{what}: {rc}")

    reservation, call = mem.XEN_MEMORY_RESERVATION, h.call
    for victim in (0, 1):
        for port in range(1, 40):
            data = ec.EVTCHN_BIND_INTERDOMAIN.pack(ec.evtchn_bind_interdomain(victim, port, 0))
            expect_refused(
                f"bind d{victim} {port}",
                call(xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_bind_interdomain, data)[0],
            )
        maps = [gt.gnttab_map_grant_ref(0, gt.GNTMAP_host_map, ref, victim, 0, 0, 0) for ref in range(64)]
        data = b"".join(gt.GNTTAB_MAP_GRANT_REF.pack(each) for each in maps)
        _, reply = call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, data)
        for ref, each in enumerate(gt.GNTTAB_MAP_GRANT_REF.unpack_array(reply, len(maps))):
            expect_refused(f"map d{victim} ref {ref}", each.status)
        own = gt.gnttab_copy_ptr(h.extent["base"], xen.DOMID_SELF, 0)
        for source in range(0x1000, 0x1000 + 0x8000, 0x333):
            theirs = gt.gnttab_copy_ptr(source, victim, 0)
            for pair in ((theirs, own), (own, theirs)):
                data = gt.GNTTAB_COPY.pack(gt.gnttab_copy(pair[0], pair[1], 64, 0, 0))
                _, reply = call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_copy, data)
                expect_refused(f"copy d{victim} {source:#x}", gt.GNTTAB_COPY.unpack(reply).status)
        for cmd in (
            mem.XENMEM_increase_reservation,
            mem.XENMEM_populate_physmap,
            mem.XENMEM_decrease_reservation,
        ):
            data = reservation.pack(mem.xen_memory_reservation(0, 1, 0, 0, victim)) + (0x1000).to_bytes(
                8, "little"
            )
            expect_refused(f"memory_op {cmd} d{victim}", call(xen.HYPERVISOR_memory_op, cmd, data)[0])
        data = sched.SCHED_REMOTE_SHUTDOWN.pack(sched.sched_remote_shutdown(victim, 3))
        expect_refused(
            f"shutdown d{victim}", call(xen.HYPERVISOR_sched_op, sched.SCHEDOP_remote_shutdown, data)[0]
        )
        setup = gt.GNTTAB_SETUP_TABLE.pack(gt.gnttab_setup_table(victim, 1, 0, 0))
        rc, reply = call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_setup_table, setup)
        status = gt.GNTTAB_SETUP_TABLE.unpack(reply).status if rc == 0 and reply else -1
        expect_refused(f"setup_table d{victim}", status)
    base, frames = h.extent["base"], h.extent["frames"]
    for mfn in (0, 1, base - 1, base - 300, base + frames, base + frames + 5000, (1 << 40) - 1):
        data = reservation.pack(mem.xen_memory_reservation(0, 1, 0, 0, xen.DOMID_SELF)) + (
            mfn & ~(1 << 63)
        ).to_bytes(8, "little")
        rc, _ = call(xen.HYPERVISOR_memory_op, mem.XENMEM_decrease_reservation, data)
        if rc != 0:
            expect_refused(f"give back {mfn:#x}", rc)
    for port in range(3, 4096, 17):
        data = ec.EVTCHN_SEND.pack(ec.evtchn_send(port))
        expect_refused(f"send {port}", call(xen.HYPERVISOR_event_channel_op, ec.EVTCHNOP_send, data)[0])
    unmaps = [gt.gnttab_unmap_grant_ref(0, 0, handle, 0) for handle in range(200)]
    data = b"".join(gt.GNTTAB_UNMAP_GRANT_REF.pack(each) for each in unmaps)
    _, reply = call(xen.HYPERVISOR_grant_table_op, gt.GNTTABOP_unmap_grant_ref, data)
    for handle, undone in enumerate(gt.GNTTAB_UNMAP_GRANT_REF.unpack_array(reply, len(unmaps))):
        expect_refused(f"unmap {handle}", undone.status)
    h.say("done", rc=alive(h), taken=taken)
    h.idle()


# ---------------------------------------------------------------------------- descriptors and memory


def memfd(h: Hostile) -> None:
    """Tries to change what its own memory is."""
    h.connect()
    h.started()
    fd, size = h.extent_fd, os.fstat(h.extent_fd).st_size
    results = {
        "shrink": outcome(partial(os.ftruncate, fd, 4096)),
        "empty": outcome(partial(os.ftruncate, fd, 0)),
        "grow": outcome(partial(os.ftruncate, fd, size + (1 << 30))),
        "write behind the end": outcome(partial(os.pwrite, fd, b"x", size)),
        "allocate behind the end": outcome(partial(os.posix_fallocate, fd, size, 4096)),
        "seal write": outcome(partial(fcntl.fcntl, fd, F_ADD_SEALS, 8)),
        "seal future write": outcome(partial(fcntl.fcntl, fd, F_ADD_SEALS, 16)),
        "chmod": outcome(partial(os.fchmod, fd, 0o777)),
        "chown": outcome(partial(os.fchown, fd, os.getuid(), os.getgid())),
        "open again": outcome(partial(os.open, f"/proc/self/fd/{fd}", os.O_RDWR)),
    }
    h.say("done", rc=alive(h), results=results, size=os.fstat(fd).st_size - size)
    h.idle()


def descriptors(h: Hostile) -> None:
    """Sends descriptors where they are not asked for, until the socket takes no more; and garbage without."""
    h.connect()
    h.started()
    h.descriptors.setblocking(False)
    own = [os.memfd_create(f"gift-{number}") for number in range(50)]
    sent = 0
    with contextlib.suppress(OSError):
        for _ in range(2000):
            socket.send_fds(h.descriptors, [b"x" * 100], own)
            sent += 1
    close_all(own)
    client = RawClient(h.keys)
    gift = os.memfd_create("gift")
    with contextlib.suppress(OSError):
        for _ in range(100):
            socket.send_fds(client.socket, [client.message(encode(HARMLESS))], [gift] * 20)
    client.close()
    os.close(gift)
    h.say("done", rc=alive(h), sent=sent)
    h.idle()


POINTS = (
    "before-hello",
    "after-hello",
    "extent",
    "set_vcpu_context",
    "grant_map",
    "start",
    "half-message",
    "in-a-call",
    "grant_unmap",
)
"""Where a process dies: before anything, at an order, in the middle of what it sends."""

ATTACKS: dict[str, Callable[[Hostile], None]] = {
    "obedient": obedient,
    "flood": partial(flood, read=False),
    "flood-reading": partial(flood, read=True),
    "malformed": malformed,
    "multipart": multipart,
    "connections": connections,
    "replay": replay,
    "forged": forged,
    "garbage-answers": garbage_answers,
    "silent-map": lambda h: silent(h, "grant_map"),
    "silent-unmap": lambda h: silent(h, "grant_unmap"),
    "silent-context": lambda h: silent(h, "set_vcpu_context"),
    "silent-pause": lambda h: silent(h, "pause"),
    "every-hypercall": every_hypercall,
    "others": others,
    "memfd": memfd,
    "descriptors": descriptors,
    "lease-page": attacks_shell.lease_page,
    "endless-console": attacks_shell.endless_console,
    "last-words": attacks_shell.last_words,
    "bind-and-close": attacks_shell.bind_and_close,
    "vanish": attacks_shell.vanish,
    "forks": attacks_shell.forks,
    "granter": granter,
    "grantee": grantee,
    **{f"dies-{point}": partial(dies, point=point) for point in POINTS},
}
