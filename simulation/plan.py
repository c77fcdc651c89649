"""Fault plans: what breaks, and when. Read from TOML, or drawn from a seed.

    [[fault]]
    what = "kill"            # see What
    target = "domio"         # domio, guest, device
    event = "step:published" # the n-th event of this name; or at_ms = 20.5
    n = 3

Events (`Injector.happen`): `hypercall:NAME` (as in bus.abi.hypercalls), `grant:map`, `ring:request`, `dma`, `notify:front`,
`notify:back`, `interrupt`, `xenbus:back:N` and `xenbus:front:N` (XenbusState), `step:NAME` (of drivers.block.backend), `step:net-NAME`
(of drivers.net.backend) and `ledger:NAME` (of drivers.block.ledger); they are the same names that a trace shows. And messages on the link
of a process (dom0, domio, guest, device) that may come twice or change places (simulation.order): `notification:ROLE`, `answer:ROLE`,
`done:ROLE`; they are counted, and in a trace, only if a plan has one of them.
"""

from __future__ import annotations

import random
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bus.abi.hypercalls import HYPERCALLS
from simulation.order import KINDS, NOTIFICATION, refusal

MAX_FAULTS: Final = 64
MAX_PLAN_BYTES: Final = 1 << 16


class PlanError(ValueError):
    """The plan cannot be used: one line that names the place and the mend."""


class What(StrEnum):
    """What goes wrong."""

    KILL = "kill"
    """The target's process ends at once. Its supervisor starts another (`guest`: the domain is destroyed)."""
    FREEZE = "freeze"
    """The target does nothing for `for_ms`."""
    SLOW = "slow"
    """Messages to the target take `factor` times as long, for `for_ms`."""
    LOSE = "lose"
    """The notification that the event names is lost (`notify:front`, `notify:back`, `interrupt`)."""
    DUPLICATE = "duplicate"
    """The notification, or the message of the event (`notification:ROLE`, `answer:ROLE`, `done:ROLE`), comes twice."""
    REORDER = "reorder"
    """The message of the event changes places with the next of its kind, if that comes within 50 ms."""
    DELAY = "delay"
    """The notification comes `for_ms` later."""
    POWER_CUT = "power-cut"
    """The disk loses power: of what it had not flushed, any part reached the medium, sectors perhaps torn; then it starts again."""
    DEVICE_ERROR = "device-error"
    """The medium fails the next `count` requests."""
    NO_MEMORY = "no-memory"
    """The hypercall of the event is refused: ENOMEM."""
    NO_GRANTS = "no-grants"
    """The grant map of the event is refused: GNTST_no_space."""
    NO_PORTS = "no-ports"
    """The hypercall of the event is refused: ENOSPC."""
    WRONG_DMA = "wrong-dma"
    """The device's DMA of the event (`dma`) goes to a frame that it was never given."""
    CLOCK_JUMP = "clock-jump"
    """`for_ms` pass in no time."""


NOTIFICATIONS: Final = ("notify:front", "notify:back", "interrupt")
STEPS: Final = (
    "copied", "taken", "mapped", "submitting", "submitted", "dirty", "completed", "unmapped", "flushed", "placed", "written",
    "published", "answered", "notified", "resumed",
)  # fmt: skip
LEDGER_STEPS: Final = (
    "record.torn", "record", "taken", "consumer", "submitted", "completed", "answer", "answering", "answered",
)  # fmt: skip
NET_STEPS: Final = (
    "copied", "fetched", "sent", "noted", "begun", "written", "published", "answered", "taken", "filled",
)  # fmt: skip
"""Of drivers.net.backend."""
RARE_STEPS: Final = ("recover.place", "recover.freed", "head.torn", "head.written")
"""Of the ledger, when a connection or a successor begins; not drawn by chance."""
DOMAINS: Final = ("dom0", "domio", "guest")
DEVICES: Final = ("device",)
CALLS: Final = frozenset(
    command.name.lower() for call in HYPERCALLS.values() if call is not None for command in call.commands
)
EVENTS: Final = frozenset(
    [
        "grant:map", "ring:request", "dma", "notify:xenstore", *NOTIFICATIONS,
        *(f"xenbus:{end}:{state}" for end in ("front", "back") for state in range(9)),
        *(f"step:{name}" for name in STEPS), *(f"ledger:{name}" for name in (*LEDGER_STEPS, *RARE_STEPS)),
        *(f"step:net-{name}" for name in NET_STEPS), *(f"hypercall:{name}" for name in CALLS),
        *(f"{kind}:{role}" for kind in KINDS for role in (*DOMAINS, *DEVICES) if (kind, role) != (NOTIFICATION, "device")),
    ]
)  # fmt: skip
REAL_ONLY: Final = ("segfault", "silence", "cut", "spurious", "corrupt", "truncate", "no-iommu")
"""Faults of machines of real processes (simulation.live.plan)."""


class Fault(BaseModel):
    """One fault."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: What
    target: Literal["domio", "guest", "device"] = "domio"
    event: Annotated[str, Field(max_length=64)] = ""
    n: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    at_ms: Annotated[float, Field(ge=0, le=600_000)] | None = None
    """After the scenario's disk was plugged in (simulated time)."""
    for_ms: Annotated[float, Field(gt=0, le=60_000)] = 50.0
    factor: Annotated[float, Field(ge=1, le=1000)] = 10.0
    count: Annotated[int, Field(ge=1, le=1000)] = 1

    @field_validator("what", mode="before")
    @classmethod
    def _simulated(cls, what: object) -> object:
        if what in REAL_ONLY:
            raise ValueError(
                f"{what} is not simulated, it is for machines of real processes (see docs/faults.md)"
            )
        return what

    @model_validator(mode="after")
    def _fits(self) -> Fault:
        if bool(self.event) == (self.at_ms is not None):
            raise ValueError("give either event (with n) or at_ms")
        needs: dict[What, tuple[str, ...]] = {
            What.LOSE: NOTIFICATIONS,
            What.DELAY: NOTIFICATIONS,
            What.NO_GRANTS: ("grant:map",),
            What.WRONG_DMA: ("dma",),
        }
        wanted = needs.get(self.what)
        if wanted is not None and self.event not in wanted:
            raise ValueError(f"{self.what} needs event = one of {', '.join(wanted)}")
        of_link = self.what is What.REORDER or (
            self.what is What.DUPLICATE and self.event not in NOTIFICATIONS
        )
        if of_link and (why := refusal(self.what, self.event, DEVICES, DOMAINS)):
            raise ValueError(why)
        if self.what in (What.NO_MEMORY, What.NO_PORTS) and not self.event.startswith("hypercall:"):
            raise ValueError(f"{self.what} needs event = 'hypercall:NAME'")
        if self.event and self.event not in EVENTS:
            raise ValueError(f"event {self.event!r}: no event is named so (see docs/faults.md)")
        return self

    def text(self) -> str:
        """As one line of TOML: the fields that are not as by default."""
        fields = [f'what = "{self.what}"']
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name == "target" and self.what in (What.KILL, What.FREEZE, What.SLOW):
                fields.append(f'target = "{value}"')
            elif name != "what" and value != field.default:
                fields.append(f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}")
        return "{ " + ", ".join(fields) + " }"


class Plan(BaseModel):
    """Faults, and the shape of the scenario."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fault: Annotated[tuple[Fault, ...], Field(max_length=MAX_FAULTS)] = ()
    random_faults: Annotated[int, Field(ge=0, le=16)] = 0
    """Up to so many more, drawn from the seed."""
    operations: Annotated[int, Field(ge=1, le=100_000)] = 24
    """Reads, writes and flushes of the guest; frames that it sends."""
    scenario: Literal["disk", "network"] = "disk"
    """What the guest has of the driver domain (`domio` is NetIO then)."""

    def toml(self) -> str:
        """The plan as a file holds it."""
        lines = [f"operations = {self.operations}"]
        if self.scenario != "disk":
            lines.append(f'scenario = "{self.scenario}"')
        if self.random_faults:
            lines.append(f"random_faults = {self.random_faults}")
        lines.append("fault = [")
        lines += [f"  {fault.text()}," for fault in self.fault]
        return "\n".join([*lines, "]"])

    @property
    def errors_expected(self) -> bool:
        """The guest may see requests fail."""
        return any(
            f.what in (What.DEVICE_ERROR, What.NO_MEMORY, What.NO_GRANTS, What.NO_PORTS, What.WRONG_DMA)
            for f in self.fault
        )


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ""
    for part in first["loc"]:
        where += f"[{part + 1}]" if isinstance(part, int) else (f".{part}" if where else str(part))
    text = first["msg"].removeprefix("Value error, ")
    return f"{where or 'plan'}: {text}"


def parse_plan(text: str, name: str = "plan") -> Plan:
    """A plan from TOML. PlanError: one line."""
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{name}: not TOML: {error}") from None
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise PlanError(f"{name}: {_first(error)}") from None


def load_plan(path: Path) -> Plan:
    """A plan from a file. PlanError: one line."""
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise PlanError(f"{path}: a plan has at most {MAX_PLAN_BYTES} bytes")
        return parse_plan(path.read_text("utf-8"), str(path))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path}: not UTF-8 text") from None


def random_faults(rng: random.Random, most: int, operations: int) -> tuple[Fault, ...]:
    """Faults that the machine must survive without the guest's losing anything that was acknowledged; when they strike fits a guest of so
    many operations."""
    faults: list[Fault] = []
    some = 1 + operations * 14 // 24
    for _ in range(rng.randint(1, most) if most else 0):
        draw = rng.random()
        if draw < 0.4:
            name = rng.choice([f"step:{s}" for s in STEPS] + [f"ledger:{s}" for s in LEDGER_STEPS])
            n = rng.randint(1, max(2, operations // 2))
            faults.append(Fault(what=What.KILL, target="domio", event=name, n=n))
        elif draw < 0.48:
            faults.append(
                Fault(what=What.KILL, target="domio", at_ms=round(rng.uniform(0, 6 + operations), 3))
            )
        elif draw < 0.58:
            n = rng.randint(1, 20 + operations * 5 // 2)
            faults.append(Fault(what=What.KILL, target="device", event="dma", n=n))
        elif draw < 0.70:
            # Not drawn: the guest's death: the scenario would be over.
            n = rng.randint(10, 30 + operations * 5 // 2)
            if draw < 0.64:
                faults.append(Fault(what=What.POWER_CUT, event="dma", n=n))
            else:  # before the device has seen what the back end submitted
                n = max(1, n * operations // 120)
                faults.append(Fault(what=What.POWER_CUT, event="step:submitted", n=n))
        elif draw < 0.75:
            faults.append(Fault(what=What.LOSE, event="interrupt", n=rng.randint(3, 6 + operations)))
        elif draw < 0.81:
            what, event = rng.choice([What.DUPLICATE, What.DELAY]), rng.choice(NOTIFICATIONS)
            faults.append(Fault(what=what, event=event, n=rng.randint(1, 1 + operations), for_ms=5.0))
        elif draw < 0.86:
            target: Any = rng.choice(["domio", "device", "guest"])
            n = rng.randint(1, some)
            faults.append(Fault(what=What.FREEZE, target=target, event="ring:request", n=n, for_ms=200.0))
        elif draw < 0.89:
            at = round(rng.uniform(0, 10), 3)
            faults.append(Fault(what=What.SLOW, target="domio", at_ms=at, for_ms=20.0))
        elif draw < 0.92:
            n = rng.randint(2, 3 + operations // 2)
            faults.append(Fault(what=What.NO_GRANTS, event="grant:map", n=n))
        elif draw < 0.98:
            faults.append(Fault(what=What.DEVICE_ERROR, event="ring:request", n=rng.randint(1, some)))
        else:
            n = rng.randint(1, some)
            faults.append(Fault(what=What.CLOCK_JUMP, event="ring:request", n=n, for_ms=300.0))
    return tuple(faults)
