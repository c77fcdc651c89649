"""`./devtool demo` from outside: what its record says is true of the processes and files that were there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolstack.demo.guest import FILE_KB, look_at_disk
from toolstack.demo.rogue import targets

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_the_demo_ends_well_and_its_record_says_what_happened(tmp_path: Path) -> None:
    """Exit status 0; each killed process has a successor with another pid (and uid, as root); every acknowledged write was found; no
    DMA request of the attack was allowed."""
    record_file = tmp_path / "demo.json"
    done = subprocess.run(
        [sys.executable, "-m", "toolstack.demo", "--json", str(record_file)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    record = json.loads(record_file.read_text())
    assert record["ok"]
    assert [step["ok"] for step in record["steps"]] == [True] * 9
    assert [blow["role"] for blow in record["blows"]] == ["domio", "nvme"]
    for blow in record["blows"]:
        assert blow["pid"] != blow["new_pid"]
        assert blow["writes_after"] >= 4
        assert not os.path.exists(f"/proc/{blow['new_pid']}")
    if os.getuid() == 0:
        before = [one["uid"] for one in record["processes_before"] if not one["waits"]]
        assert len(set(before)) == len(before)
        assert all(blow["uid"] != blow["new_uid"] for blow in record["blows"])
    assert record["dma"]["asked"] == record["dma"]["refused"] == len(targets())
    assert record["dma"]["allowed"] == 0
    assert record["writes"]["acknowledged"] == record["writes"]["verified"] > 8
    assert record["guest"] == {"end": "poweroff", "io_errors": 0}
    assert record["e2fsck"]["status"] == 0
    assert "all well: 9 of 9 steps" in done.stdout


def test_a_lost_write_is_found(tmp_path: Path) -> None:
    """The demo's look at the disk is no formality: a file that is missing, and one that is not as acknowledged, are named."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "f0").write_bytes(bytes(FILE_KB << 10))
    (root / "f1").write_bytes(b"\1" * (FILE_KB << 10))
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(4 << 20)
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/sbin:/usr/sbin"}
    subprocess.run(["mke2fs", "-qF", "-t", "ext4", "-d", root, disk], check=True, env=environment)
    zeros = "de2f256064a0af797747c2b97505dc0b9f3df0de4f489eac731c23ae9ca9cc31"
    verdict = look_at_disk(disk, {0: zeros, 1: zeros, 2: zeros})
    assert verdict.wrong == [1, 2]
    assert (verdict.checked, verdict.fsck_status) == (3, 0)


def test_a_machine_that_does_not_start_is_exit_status_1(tmp_path: Path) -> None:
    """The failed step is named, and the record is written all the same."""
    record_file = tmp_path / "demo.json"
    done = subprocess.run(
        [sys.executable, "-m", "toolstack.demo", "--json", str(record_file)],
        capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | {"DOMICILE_RUN": "/" + "x" * 90},
    )  # fmt: skip
    assert done.returncode == 1
    record = json.loads(record_file.read_text())
    assert not record["ok"]
    assert record["steps"][-1]["ok"] is False
    assert "too long" in record["steps"][-1]["detail"]
