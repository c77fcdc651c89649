"""What every told story of a machine has: steps that fail if what they promise did not happen, guests that are watched, a record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from toolstack.cli.images import Images, make_config
from toolstack.client import ControlClient
from toolstack.demo.guest import Watched, look_at_disk
from toolstack.demo.show import Show
from toolstack.errors import MachineError

STEP_S: Final = 40.0
MORE_WRITES: Final = 4
"""How many further writes must be acknowledged after each blow before the guest counts as going on."""
T = TypeVar("T")
RECORD_VERSION: Final = 1


class StepFailed(Exception):
    """What was promised did not happen."""


@dataclass(slots=True)
class Step:
    """A step that is over: ok None is one that was left out."""

    name: str
    ok: bool | None
    seconds: float
    detail: str


@dataclass(slots=True)
class Record:
    """What happened, for --json."""

    steps: list[Step] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every step did what it promised."""
        return bool(self.steps) and all(step.ok is not False for step in self.steps)

    def as_json(self) -> dict[str, Any]:
        """Keys: version, ok, seconds, root, steps, and what each step found."""
        steps = [
            {"name": s.name, "ok": s.ok, "seconds": round(s.seconds, 3), "detail": s.detail}
            for s in self.steps
        ]
        return {
            "version": RECORD_VERSION,
            "ok": self.ok,
            "root": os.getuid() == 0,
            "steps": steps,
            **self.facts,
        }


class Telling:
    """One run. `client` is set once the machine is there."""

    client: ControlClient

    def __init__(self, show: Show) -> None:
        self.show = show
        self.record = Record()
        self.record.facts["blows"] = []
        self._guests: dict[str, Watched] = {}

    def _step(self, name: str, work: Callable[[], tuple[T, str]]) -> T:
        begin = time.monotonic()
        try:
            result, detail = work()
        except (StepFailed, MachineError, OSError) as error:
            text = str(error)
            self.record.steps.append(Step(name, False, time.monotonic() - begin, text.splitlines()[0][:200]))
            self.show.line(f"FAILED: {name}: {text}", "bad")
            raise StepFailed(name) from None
        self.record.steps.append(Step(name, True, time.monotonic() - begin, detail))
        return result

    # ------------------------------------------------------------------ waiting

    def _wait(self, what: str, done: Callable[[], bool], timeout: float, guest: str = "debian") -> None:
        """Take notices until `done`. StepFailed with the console's tail."""
        deadline = time.monotonic() + timeout
        with self.show.waiting(what) as waiting:
            while not done():
                watched = self._guests.get(guest)
                if time.monotonic() > deadline or (watched is not None and watched.ended is not None):
                    why = f"the guest ended: {watched.ended}" if watched and watched.ended else "not in time"
                    raise StepFailed(f"{what}: {why}\n{watched.tail() if watched else ''}")
                self._poll(0.1)
                waiting.tick(watched.lines[-1][:50] if watched and watched.lines else "")

    def _poll(self, timeout: float) -> None:
        notice = self.client.notice(timeout)
        if notice is not None and notice.body.get("name") in self._guests:
            self._guests[notice.body["name"]].take(notice.what, notice.body)

    def _create(self, name: str, **fields: Any) -> None:
        self._guests[name] = Watched(name)
        with Images() as images:
            config = make_config({"name": name, "on_reboot": "destroy", **fields}, images)
            self.client.request("create", {"config": config, "attach": True}, images.descriptors)

    def _type(self, name: str, text: str) -> None:
        self.client.request("type", {"domain": name, "data": text.encode()})

    def _goes_on(self, what: str) -> tuple[int, float]:
        """Wait for writes that began after now; how many there are, and the seconds up to the first."""
        debian = self._guests["debian"]
        before, begin, first = max(debian.acknowledged, default=-1), time.monotonic(), 0.0

        def more() -> bool:
            nonlocal first
            # The file after the last acknowledged one may have been on its way: it does not count.
            count = max(debian.acknowledged, default=-1) - before - 1
            if count >= 1 and not first:
                first = time.monotonic() - begin
            return count >= MORE_WRITES

        self._wait(f"{what}; the guest writes on", more, STEP_S)
        return max(debian.acknowledged) - before - 1, first

    def _look(self, disk: Path) -> tuple[None, str]:
        self.show.line("The host looks into the disk's file", "head")
        debian = self._guests["debian"]
        verdict = look_at_disk(disk, debian.acknowledged)
        self.record.facts["writes"] = {
            "acknowledged": verdict.checked, "verified": verdict.checked - len(verdict.wrong), "wrong": verdict.wrong,
        }  # fmt: skip
        self.record.facts["e2fsck"] = {"status": verdict.fsck_status, "says": verdict.fsck_says}
        if verdict.wrong:
            raise StepFailed(f"acknowledged, but not there: files {verdict.wrong}")
        if verdict.fsck_status or not verdict.checked:
            raise StepFailed(f"e2fsck ends with status {verdict.fsck_status}: {verdict.fsck_says}")
        text = f"{verdict.checked} of {verdict.checked} files have their checksums; e2fsck finds nothing"
        self.show.line(f"    {text}", "good")
        return None, text
