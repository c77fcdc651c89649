"""What the CPU side of a PV domain needs of the hypervisor process. The process shell implements it over the bus; tests
implement it with a fake.

That vCPUs block and wake is not told here: `PvDomain.run_slice` returns it to the shell, which owns the lease.
"""

from __future__ import annotations

from typing import Protocol

from bus.addresses import Port


class Upstream(Protocol):
    """The way to the hypervisor. All methods are called on the vCPU's thread, between two guest instructions."""

    def hypercall(self, vcpu: int, nr: int, cmd: int, data: bytes) -> tuple[int, bytes]:
        """Make hypercall `nr`, command `cmd`, in the wire form of its entry in `bus.abi.hypercalls` and wait for the answer.

        Returns (Xen's return value: >= 0 or a negative errno, updated structure bytes). A hypervisor that is gone or silent
        is answered by the implementation with a negative errno, never by waiting without bound.
        """

    def send_event(self, port: Port) -> int:
        """EVTCHNOP_send: ring the doorbell of the channel, or make the hypercall. 0 or a negative errno."""

    def console_line(self, text: str) -> None:
        """A line for the hypervisor's log about this domain (guest warnings that Xen would print)."""
