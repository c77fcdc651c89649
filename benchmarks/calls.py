"""Hypercalls and events against what they are made of: `python benchmarks/calls.py`.

* A hypercall that the domain's own process serves, from guest code and back to it: a loop of SYSCALLs on a vCPU.
* A hypercall that the hypervisor serves, asked by a program with a domain's credentials on a real machine; beside it, in the same run, the
  round trip of two Python processes over ZeroMQ (DEALER and ROUTER, ipc, CURVE as on the bus, and without), nothing else done.
* An event from one domain's process to another's handler (half of a round trip); beside it two processes with eventfds and epoll.

Aims (issue 3): 3 us; 1.5 times the raw ZeroMQ round trip; twice the raw wake-up.
"""

from __future__ import annotations

import os
import select
import signal
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.programs.native_guest import create, machine_of, wait
from bus.abi import xen
from tests.unit.pvcpu import rig as pv

ROUNDS = 3000
LOOPS = 100_000


def in_process(number: int, *args: int) -> float:
    """Microseconds a hypercall, from guest code to guest code."""
    guest = pv.Rig()
    call = pv.hypercall(number, *args)
    loop = call + bytes.fromhex("48ffcb")  # dec rbx
    back = -(len(loop) + 6)
    body = b"\x48\xbb" + struct.pack("<Q", LOOPS) + loop + b"\x0f\x85" + struct.pack("<i", back) + pv.STOP
    guest.put(pv.CODE, body)
    guest.regs.rip = pv.CODE
    start = time.perf_counter()
    while not guest.stopped:
        guest.domain.run_slice()
    return (time.perf_counter() - start) / LOOPS * 1e6


def raw_zmq(*, curve: bool) -> float:
    """Microseconds of a round trip: the median."""
    with tempfile.TemporaryDirectory() as directory:
        endpoint = f"ipc://{directory}/s"
        public, secret = zmq.curve_keypair()
        child = os.fork()
        if child == 0:
            try:
                server = zmq.Context().socket(zmq.ROUTER)
                if curve:
                    server.curve_server, server.curve_publickey, server.curve_secretkey = True, public, secret
                server.bind(endpoint)
                while True:
                    server.send_multipart(server.recv_multipart())
            finally:
                os._exit(0)
        client = zmq.Context().socket(zmq.DEALER)
        client.setsockopt(zmq.RCVTIMEO, 10_000)
        if curve:
            client.curve_serverkey = public
            client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
        client.connect(endpoint)
        times = []
        payload = bytes(80)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            client.send(payload)
            client.recv()
            times.append(time.perf_counter() - start)
        client.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return statistics.median(times) * 1e6


def raw_eventfd() -> float:
    """Microseconds from a write to the other process's return from epoll: half of a round trip, the median."""
    there, back = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)

    def wait_for(poller: select.epoll, fd: int) -> None:
        while not poller.poll(10):
            pass
        os.eventfd_read(fd)

    child = os.fork()
    if child == 0:
        try:
            poller = select.epoll()
            poller.register(there, select.EPOLLIN)
            for _ in range(ROUNDS):
                wait_for(poller, there)
                os.eventfd_write(back, 1)
        finally:
            os._exit(0)
    poller = select.epoll()
    poller.register(back, select.EPOLLIN)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        os.eventfd_write(there, 1)
        wait_for(poller, back)
        times.append(time.perf_counter() - start)
    os.waitpid(child, 0)
    return statistics.median(times) / 2 * 1e6


def main() -> None:
    """Print the table."""
    for name, number, args in (
        ("xen_version", xen.HYPERVISOR_xen_version, (0, 0)),
        ("fpu_taskswitch", xen.HYPERVISOR_fpu_taskswitch, (0,)),
    ):
        print(f"in the domain's process, {name:15} {in_process(number, *args):6.2f} us (aim: under 3)")
    zmq_before, plain_before, eventfd_before = raw_zmq(curve=True), raw_zmq(curve=False), raw_eventfd()
    with machine_of("benchmarks.programs.calls_guest") as machine:
        create(machine, "asks")
        call = wait(machine, 0)["microseconds"]
        port = wait(machine, 1)
        create(machine, "rings", cmdline=f"{port['domid']} {port['port']}")
        event = wait(machine, 2)["microseconds"]
    curve, plain = (zmq_before + raw_zmq(curve=True)) / 2, (plain_before + raw_zmq(curve=False)) / 2
    eventfd = (eventfd_before + raw_eventfd()) / 2
    print(
        f"by the hypervisor {call:6.1f} us; raw ZeroMQ with CURVE {curve:6.1f} us, without {plain:6.1f} us: "
        f"ratio {call / curve:.2f}, {call / plain:.2f} (aim: at most 1.5)"
    )
    print(
        f"event {event:6.1f} us; raw eventfd {eventfd:6.1f} us: ratio {event / eventfd:.2f} (aim: at most 2)"
    )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
