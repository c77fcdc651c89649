"""`docker compose --profile chaos up`: a fault plan against the machine in containers, while a guest writes to its disk.

    python -m toolstack.demo.faults [--plan FILE.toml] [--json FILE]

A plan is TOML with the words of docs/faults.md, as far as they make sense for real processes:

    [[fault]]
    what = "kill"        # kill, freeze (SIGSTOP, and SIGCONT after for_ms), end-container
    target = "domio"     # a container's name
    at_ms = 2000         # after the guest's first writes
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import tomllib
from functools import partial
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from toolstack.demo.containers import BACK_S, ContainerTelling, tell, turn
from toolstack.demo.guest import get_rooted
from toolstack.demo.show import Show
from toolstack.demo.telling import Record, StepFailed
from toolstack.errors import InputError, MachineError

MAX_PLAN_BYTES: Final = 1 << 16
MAX_MS: Final = 120_000


class Fault(BaseModel):
    """One blow."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    what: Literal["kill", "freeze", "end-container"]
    target: Annotated[str, Field(max_length=32, pattern=r"^[a-z0-9-]+$")]
    at_ms: Annotated[int, Field(ge=0, le=MAX_MS)]
    for_ms: Annotated[int, Field(ge=1, le=MAX_MS)] = 1000

    @model_validator(mode="after")
    def _sense(self) -> Fault:
        if self.target in ("hypervisor", "dom0", "warden"):
            raise ValueError(f"{self.target} is not replaced when it dies: the machine goes down with it")
        if self.target.startswith("domu"):
            raise ValueError(f"{self.target} has the guest that is to survive")
        return self


class Plan(BaseModel):
    """A list of faults, in the order of their times."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    fault: Annotated[list[Fault], Field(min_length=1, max_length=64)]


DEFAULT: Final = """
[[fault]]
what = "kill"
target = "domio"
at_ms = 0
[[fault]]
what = "kill"
target = "nvme"
at_ms = 4000
[[fault]]
what = "freeze"
target = "domio"
at_ms = 8000
for_ms = 400
[[fault]]
what = "end-container"
target = "domio"
at_ms = 10000
[[fault]]
what = "end-container"
target = "nvme"
at_ms = 16000
"""


def load(path: str) -> Plan:
    """The plan of a file ('': the default one). InputError, one line that names the place."""
    try:
        if path:
            with open(path, "rb") as file:
                raw = file.read(MAX_PLAN_BYTES + 1)
            if len(raw) > MAX_PLAN_BYTES:
                raise InputError(f"{path}: longer than {MAX_PLAN_BYTES} bytes")
            text = raw.decode()
        else:
            text = DEFAULT
        return Plan.model_validate(tomllib.loads(text))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path or 'plan'}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


class Chaos(ContainerTelling):
    """A run of a plan."""

    def __init__(self, show: Show, plan: Plan) -> None:
        super().__init__(show)
        self._plan = sorted(plan.fault, key=lambda fault: fault.at_ms)
        self.record.facts["plan"] = [fault.model_dump() for fault in self._plan]

    def run(self) -> Record:
        """All steps, until one fails."""
        with turn(self.show) as directory:
            try:
                self._step("the machine is up", self._up)
                files = get_rooted(directory)
                self._step("a PV guest boots from its disk", lambda: self._boot(files))
                self._step(f"{len(self._plan)} faults, as planned", self._faults)
                self._step("the guest goes on", self._after)
                self._step("the guest ends in order", self._end)
                self._step("the host finds every acknowledged write", lambda: self._look(files.disk))
            except StepFailed:
                pass
            finally:
                self.finish()
        self.record.facts["seconds"] = round(self.show.elapsed(), 3)
        return self.record

    def _faults(self) -> tuple[None, str]:
        begin = time.monotonic()
        for fault in self._plan:
            self._until(begin + fault.at_ms / 1000)
            target = fault.target
            # A container that an earlier blow took away is waited for: a fault is to meet something.
            self._wait(f"{target} is there", partial(self._is_there, target), BACK_S)
            self.show.line(f"{fault.what}: {target}", "head")
            if fault.what == "freeze":
                self.operator.strike(target, "stop")
                self._until(time.monotonic() + fault.for_ms / 1000)
                self.operator.strike(target, "cont")
            else:
                self.operator.strike(target, "kill" if fault.what == "kill" else "leave")
            self.record.facts["blows"].append(fault.model_dump())
        return None, ", ".join(f"{fault.what} {fault.target}" for fault in self._plan)

    def _is_there(self, target: str) -> bool:
        row = self.operator.agents().get(target)
        if row is None:
            raise StepFailed(f"the plan names {target!r}, and this machine has no such container")
        return bool(row.role)

    def _until(self, moment: float) -> None:
        while time.monotonic() < moment:
            self._poll(0.05)
        debian = self._guests["debian"]
        if debian.ended is not None:
            raise StepFailed(f"the guest ended: {debian.ended}\n{debian.tail()}")

    def _after(self) -> tuple[None, str]:
        count, first = self._goes_on("all faults have happened")
        self._check()
        self.show.line(f"    the guest goes on: {count} more writes, the first after {first:.1f} s", "good")
        return None, f"next write after {first:.1f} s"


def main() -> int:
    """The exit status: 0 all well, 1 a step failed, 2 bad usage or plan."""
    parser = argparse.ArgumentParser(
        prog="chaos", description="A fault plan against a machine in containers."
    )
    parser.add_argument(
        "--plan", metavar="FILE", default="", help="TOML; without it, the plan in toolstack/demo/faults.py"
    )
    parser.add_argument("--json", metavar="FILE", default="", help="write there what happened")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _frame: sys.exit(128 + signum))
    show = Show()
    try:
        chaos = Chaos(show, load(options.plan))
        return tell(show, chaos.run(), options.json)
    except InputError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    except MachineError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
