"""`domicile doctor --leaks`: nothing of a machine that works, during and after it; and what is made to leak is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines import RunningMachine, running_machine
from toolstack import leaks
from toolstack.guestfetch import fetch
from toolstack.warden.runtime import RuntimeDirectory, base_directory

pytestmark = pytest.mark.timeout(120)


def found(machine: RunningMachine) -> list[str]:
    """Leaks of the machine, in words."""
    return [
        f"{leak.kind}: {leak.text}"
        for leak in leaks.of_machine(machine.machine.runtime, machine.client.request("check"))
    ]


def on_host() -> set[str]:
    """All leaks on this host, in words: machines of others may have left some."""
    return {f"{leak.kind}: {leak.text}" for leak in leaks.on_host()}


def of_this_session(pid: int) -> bool:
    """The process descends from this session of pytest (tests/conftest.py)."""
    mark = f"DOMICILE_TEST_SESSION={os.environ['DOMICILE_TEST_SESSION']}".encode()
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (ProcessLookupError, FileNotFoundError):
        return False


def mine() -> list[str]:
    """Those that are of this session's machines."""
    here = str(base_directory())
    return [
        leak.text
        for leak in leaks.on_host()
        if (
            of_this_session(int(leak.mend.removeprefix("kill ")))
            if leak.kind == "process"
            else here in leak.text
        )
    ]


def doctor(machine: str) -> tuple[int, set[str]]:
    """The command's status, and the leaks that it tells."""
    command = [sys.executable, "-m", "toolstack.cli", "-M", machine, "doctor", "--leaks", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    findings = json.loads(done.stdout)
    assert all(each["ok"] or each["name"].startswith("leak: ") for each in findings), done.stderr
    return done.returncode, {
        f"{each['name'].removeprefix('leak: ')}: {each['text']}" for each in findings if not each["ok"]
    }


def test_a_machine_that_works_has_no_leaks_and_leaves_none() -> None:
    """With a guest, after a guest, after guests whose processes were killed, after Dom0 unmapped; and after the machine."""
    with running_machine() as machine:
        machine.create("one", fetch("grub").kernel, memory_mb=64)
        machine.expect("one", "grub> ")
        assert found(machine) == []
        machine.client.request("destroy", {"domain": "one"})
        for turn in range(2):
            domid = machine.create(f"g{turn}", fetch("grub").kernel, memory_mb=64)
            os.kill(machine.process_of(domid), signal.SIGKILL)
            machine.wait_end(f"g{turn}")
        machine.settled()
        assert found(machine) == []
        strangers = on_host()
        status, told = doctor(machine.machine.runtime.name)
        strangers |= on_host()
        # Others' machines on this host may have left something; this one did not.
        assert told <= strangers
        assert mine() == []
        assert status == (1 if told else 0)
        runtime = machine.machine.runtime
        # What a socket of a dead domain, and records that do not agree, look like.
        (runtime.bus / "99-0123abcd").touch()
        assert found(machine) == ["socket: 1 sockets of domain 99, which is gone"]
        status, told = doctor(runtime.name)
        assert status == 1
        assert "socket: 1 sockets of domain 99, which is gone" in told
        (runtime.bus / "99-0123abcd").unlink()
        checked = machine.client.request("check")
        wrong = {
            **checked,
            "counters": {**checked["counters"], "grant_references": 7, "windows": 3, "free_pages": 1 << 40},
        }
        kinds = {
            leak.kind for leak in leaks.of_machine(runtime, {**wrong, "problems": ["d1 ref 8: bits 0x18"]})
        }
        assert {"grant", "frame"} <= kinds
    assert mine() == []


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for the names of sockets, also in a worker of pytest-xdist."""
    with tempfile.TemporaryDirectory(prefix="dl-") as directory:
        yield Path(directory)


def test_what_a_killed_machine_leaves_is_named(short: Path) -> None:
    """A directory without its warden, and a process without one: with the mend."""
    base = short / "run"
    os.environ["DOMICILE_RUN"], before = str(base), os.environ["DOMICILE_RUN"]
    try:
        runtime = RuntimeDirectory("gone")
        runtime.create()
        runtime.pid.write_text("1")
        runtime.control.touch()
    finally:
        os.environ["DOMICILE_RUN"] = before
    stray = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "domicile-domu", "7"])
    try:
        told = {
            leak.kind: leak
            for leak in leaks.on_host(base)
            if str(stray.pid) in leak.text or "gone" in leak.text.split(":")[0]
        }
        assert told["directory"].mend == f"rm -r {runtime.root}"
        assert told["process"].mend == f"kill {stray.pid}"
        assert [text for text in mine() if f"process {stray.pid}:" in text], "it is this session's"
    finally:
        stray.kill()
        stray.wait(10.0)
