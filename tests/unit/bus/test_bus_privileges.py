"""What a process gives up before it reads a byte from anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os
from bus import privileges
own = privileges.drop({uid}, privileges.Limits(open_files=100, processes=20, oom_score=700))
score = open("/proc/self/oom_score_adj").read().strip()
try:
    open("/proc/self/oom_score_adj", "wb", buffering=0).write(b"-500")
    lowered = True
except OSError:
    lowered = False
status = open("/proc/self/status").read()
caps = [line.split()[1] for line in status.splitlines() if line.startswith(("CapEff", "CapPrm", "CapAmb"))]
print(own, os.getuid(), score, lowered, *caps)
"""


def run(uid: int | None) -> list[str]:
    """What is left to a process that has dropped its privileges."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(uid=uid)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_a_guests_process_is_ended_first_where_memory_is_short() -> None:
    """Nothing keeps it from allocating memory: the host's choice is to fall on it, and not on the hypervisor."""
    assert run(None)[2] == "700"


@pytest.mark.skipif(
    os.getuid() != 0, reason="processes get uids of their own where the machine is started as root"
)
def test_nothing_is_left_with_a_uid_of_its_own() -> None:
    """No capability, no other uid, and no way back from what was set."""
    own, uid, score, lowered, *caps = run(1_599_999_990)
    assert (own, uid, score, lowered) == ("True", "1599999990", "700", "False")
    assert {int(each, 16) for each in caps} == {0}


@pytest.mark.skipif(os.getuid() != 0, reason="only root has capabilities to give up")
def test_root_without_other_uids_to_give_keeps_no_capability() -> None:
    """In a user namespace that maps no other: its processes stay root, without what root may do."""
    own, uid, _, _, *caps = run(None)
    assert (own, uid) == ("False", "0")
    assert {int(each, 16) for each in caps} == {0}
