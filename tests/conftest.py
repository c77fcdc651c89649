"""For every test: machines of processes that tests start are known by a mark in their environment, and none may be left over.

`machine_leftovers` says what is there of this session's machines; the fixtures below fail a test (and the session) for it.
"""

from __future__ import annotations

import gc
import os
import secrets
import select
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MARK = f"{os.getpid()}-{secrets.token_hex(4)}"
"""Of this session: DOMICILE_TEST_SESSION of every process that descends from it."""
GRACE_S = 3.0
"""How long a process that was told to end may take."""
_ENVIRON = f"DOMICILE_TEST_SESSION={MARK}".encode()


def pytest_configure(config: pytest.Config) -> None:
    """Machines of this session live in a directory of their own, with a path short enough for Unix sockets."""
    os.environ["DOMICILE_TEST_SESSION"] = MARK
    base = Path(tempfile.mkdtemp(prefix="dt-", dir="/run" if os.access("/run", os.W_OK) else "/tmp"))
    base.chmod(0o711)
    if os.getuid() == 0:
        # User ids are handed out in one place for all machines of this host.
        shared = Path("/run/domicile/.uids")
        shared.mkdir(parents=True, exist_ok=True)
        (base / ".uids").symlink_to(shared)
    os.environ["DOMICILE_RUN"] = str(base)
    os.environ["DOMICILE_LATE_IMPORTS"] = "refuse"


def pytest_unconfigure(config: pytest.Config) -> None:
    """The directory goes with the session."""
    shutil.rmtree(os.environ["DOMICILE_RUN"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start machines take turns, on one worker: they measure time, and two cores are all there may be."""
    for item in items:
        if {"integration", "fault", "conformance", "performance"} & set(item.path.parts):
            item.add_marker(pytest.mark.xdist_group("machine"))


def processes() -> dict[int, str]:
    """Process id and command line of the session's machines' processes."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if any(word.startswith(b"domicile-") for word in words) and _ours(entry):
                found[int(entry.name)] = b" ".join(words).decode("utf-8", "replace")[:200]
        except OSError:
            continue  # it ended meanwhile
    return found


def _ours(entry: Path) -> bool:
    try:
        return _ENVIRON in (entry / "environ").read_bytes().split(b"\0")
    except PermissionError:
        # Undumpable, and we are not root: its warden's directory is all that there is to go by.
        directory = os.environ["DOMICILE_RUN"]
        return any(Path(directory).iterdir()) and entry.stat().st_uid == os.getuid()


def machine_leftovers() -> list[str]:
    """Processes and directories of this session's machines, after the grace; empty when all is well."""
    for _ in range(int(GRACE_S / 0.02)):
        if not processes():
            break
        select.select([], [], [], 0.02)
    left = [f"process {number}: {command}" for number, command in processes().items()]
    keep_logs = bool(os.environ.get("DOMICILE_KEEP_LOGS"))
    left += [
        f"directory {directory}"
        for directory in Path(os.environ["DOMICILE_RUN"]).iterdir()
        if directory.name != ".uids" and (not keep_logs or (directory / "control").exists())
    ]
    return left


def memory_files() -> set[str]:
    """The memfds that this very process has open."""
    gc.collect()
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("/memfd:domicile"):
            found.add(f"{name}: {target}")
    return found


@pytest.fixture(autouse=True)
def no_leftovers(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test with real processes fails if anything of its machines is left. A module or session fixture that keeps a machine
    on purpose is used together with `shared_machines`."""
    if not {"integration", "fault", "conformance"} & set(request.path.parts):
        yield
        return
    before = memory_files()
    yield
    if "shared_machines" not in request.fixturenames:
        left = machine_leftovers() + sorted(memory_files() - before)
        assert not left, "left over: " + "; ".join(left)


@pytest.fixture(scope="session", autouse=True)
def no_leftovers_at_the_end() -> Iterator[None]:
    """At the end of the session nothing is left, whatever was shared."""
    yield
    left = machine_leftovers()
    assert not left, "left over: " + "; ".join(left)


@pytest.fixture(scope="session")
def shared_machines() -> None:
    """Asked for by tests that share a machine: what is left is looked at when the session ends."""
