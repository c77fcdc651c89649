"""What breaks on a machine of real processes, and when.

Events, by the process that sees them:

hypervisor
    `hypercall:NAME` (as in bus.abi.hypercalls, lower case), `grant:map`, `grant:unmap`, `dma`, and `from:ROLE` and `to:ROLE`: a message
    on the link of a process of that role (dom0, domio, netio, domu, nvme). Of these, what may come twice or change places (simulation.order):
    `notification:ROLE`: events were raised (with doorbells off); `answer:ROLE`: of a hypercall, or of DMA; `done:ROLE`: an order was carried
    out, or a register access
dom0
    `xenbus:front:N` and `xenbus:back:N`: that end's XenbusState of a block device becomes N, before anybody is told; `console:TEXT`: a
    console line that the regular expression TEXT matches
domio
    `ring:request`: requests were taken from a ring; `step:NAME` and `ledger:NAME`: crash points of drivers.block.backend and ledger
nvme
    `media:read`, `media:write`, `media:flush`

The process that sees the event waits until the fault has been carried out: a kill strikes exactly there.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from simulation.order import KINDS, NOTIFICATION, refusal

EVENTS: Final = (
    "hypercall",
    "grant",
    "dma",
    "from",
    "to",
    *KINDS,
    "xenbus",
    "console",
    "ring",
    "step",
    "ledger",
    "media",
)
DOMAINS: Final = ("dom0", "domio", "netio", "domu")
DEVICES: Final = ("nvme",)
ROLES: Final = ("hypervisor", "dom0", "domio", "netio", "domu", "nvme")


class What(StrEnum):
    """What goes wrong."""

    KILL = "kill"
    """SIGKILL to the target. (Whoever is supervised starts again.)"""
    SEGFAULT = "segfault"
    """SIGSEGV."""
    FREEZE = "freeze"
    """SIGSTOP, and SIGCONT after `for_ms` (0: never)."""
    SLOW = "slow"
    """The target gets one part in `factor` of its time, for `for_ms`."""
    DELAY = "delay"
    """Messages of the target's link, in both directions, come `latency_ms` (and up to `jitter_ms`) later, for `for_ms`. At a hypercall or
    `dma`: this message comes so much later, and what follows it on the link after it."""
    BANDWIDTH = "bandwidth"
    """What passes on the target's link, and of a device's DMA, is at most `bytes_per_s` in each direction, for `for_ms`."""
    SILENCE = "silence"
    """Nothing passes on the target's link for `for_ms`; then all of it does, in order."""
    CUT = "cut"
    """The target's connection is closed."""
    LOSE = "lose"
    """The notification of the event (`notification:ROLE`, with doorbells off) is lost; at `to:ROLE` the message, if it is a notification;
    at `dma`: its interrupts are."""
    DUPLICATE = "duplicate"
    """The message of the event (`notification:ROLE`, `answer:ROLE`, `done:ROLE`) comes twice."""
    REORDER = "reorder"
    """That message changes places with the next of its kind on its link, if that comes within `latency_ms`."""
    SPURIOUS = "spurious"
    """The device of the event (`dma`) raises its vectors 0 and 1 besides."""
    CORRUPT = "corrupt"
    """A byte of the message of the event (`from:ROLE`, `to:ROLE`) is another."""
    TRUNCATE = "truncate"
    """The second half of that message is missing."""
    NO_MEMORY = "no-memory"
    """The hypercall of the event is refused: ENOMEM."""
    NO_PORTS = "no-ports"
    """The hypercall of the event is refused: ENOSPC."""
    NO_GRANTS = "no-grants"
    """The grant map of the event is refused: GNTST_no_space."""
    NO_IOMMU = "no-iommu"
    """The grant map of the event is refused as without frames for I/O page tables: GNTST_general_error."""
    WRONG_DMA = "wrong-dma"
    """The DMA of the event goes to an address that the device was never given."""
    DEVICE_ERROR = "device-error"
    """The media fail the next `count` requests."""
    CLOCK_JUMP = "clock-jump"
    """The machine's time of day jumps by `by_ms`: the wall clock of every guest, and the RTC of full HVM guests."""
    POWER_CUT = "power-cut"
    """The disk loses power and starts again. What it wrote since the last flush is `kept`, `lost`, or each sector by chance (`torn`)."""


LINKS: Final = (What.DELAY, What.BANDWIDTH, What.SILENCE, What.CUT)
HYPERVISORS: Final = (*LINKS, What.CLOCK_JUMP)
"""What the hypervisor's observer carries out."""
PASSIVE: Final = (
    What.LOSE, What.DUPLICATE, What.REORDER, What.SPURIOUS, What.CORRUPT, What.TRUNCATE, What.NO_MEMORY, What.NO_PORTS, What.NO_GRANTS, What.NO_IOMMU, What.WRONG_DMA,
)  # fmt: skip
_NEEDS: Final[dict[What, tuple[str, ...]]] = {
    What.LOSE: ("to", "dma", NOTIFICATION), What.SPURIOUS: ("dma",), What.CORRUPT: ("from", "to"), What.TRUNCATE: ("from", "to"),
    What.NO_MEMORY: ("hypercall",), What.NO_PORTS: ("hypercall",), What.NO_GRANTS: ("grant",), What.NO_IOMMU: ("grant",),
    What.WRONG_DMA: ("dma",),
}  # fmt: skip


class Fault(BaseModel):
    """One fault. ValueError (pydantic's) that names the field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: What
    target: Annotated[
        str, Field(max_length=40, pattern=r"^(hypervisor|dom0|domio|netio|domu|nvme)(:[0-9]+)?$")
    ] = "domio"
    """A role, or one process of it: `domu:3` (domain id), `nvme:8` (PCI address)."""
    event: Annotated[str, Field(max_length=200)] = ""
    n: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    at_ms: Annotated[float, Field(ge=0, le=600_000)] | None = None
    """After the plan was given (host's clock)."""
    for_ms: Annotated[float, Field(ge=0, le=60_000)] = 50.0
    latency_ms: Annotated[float, Field(ge=0, le=10_000)] = 10.0
    jitter_ms: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    bytes_per_s: Annotated[int, Field(ge=1, le=1 << 40)] = 1_000_000
    by_ms: Annotated[float, Field(ge=-1e14, le=1e14)] = 3_600_000.0
    factor: Annotated[int, Field(ge=2, le=100)] = 10
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    keep: Literal["kept", "lost", "torn"] = "torn"
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @model_validator(mode="after")
    def _fits(self) -> Fault:
        if bool(self.event) == (self.at_ms is not None):
            raise ValueError("give either event (with n) or at_ms")
        kind = self.event.partition(":")[0]
        if self.event and kind not in EVENTS:
            raise ValueError(f"event {self.event!r}: no event is named so (see docs/faults.md)")
        needs = _NEEDS.get(self.what)
        if needs is not None and kind not in needs:
            raise ValueError(f"{self.what} needs an event of {', '.join(needs)}")
        if self.what in (What.DUPLICATE, What.REORDER) and (
            why := refusal(self.what, self.event, DEVICES, DOMAINS)
        ):
            raise ValueError(why)
        if self.what in (What.POWER_CUT, What.DEVICE_ERROR) and not self.target.startswith("nvme"):
            raise ValueError(f"{self.what} needs target = 'nvme'")
        if self.what is What.CLOCK_JUMP and self.target != "hypervisor":
            raise ValueError("clock-jump needs target = 'hypervisor': the time of day is the whole machine's")
        if self.what in LINKS and self.target.startswith("hypervisor"):
            raise ValueError(f"{self.what}: the hypervisor has no link of its own: name the other end")
        return self
