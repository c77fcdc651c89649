"""Each fuzzer for four seconds (`long`: a minute) from a fixed seed: that it runs, is guided by coverage, and finds nothing. `./devtool fuzz` runs longer."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bus.addresses import Mfn
from tests.fuzz.__main__ import NAMES
from tests.fuzz.core_machine import WholeCore, ready
from tests.fuzz.targets import TARGETS, Bytes, run_calls, seeds

pytest.importorskip("atheris", reason="no atheris for this Python")


def test_every_target_has_a_name() -> None:
    """The command's list is that of the functions; each takes its own seeds, no input, and one byte."""
    assert set(NAMES) == set(TARGETS)
    for name, target in TARGETS.items():
        for data in [b"", b"\xff", *seeds(name)[:20]]:
            target(data)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_finds_nothing(name: str, seconds: int, tmp_path: Path) -> None:
    """And it went on to inputs of its own, of which some reached something new, or the run proves nothing."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        name,
        "--seconds",
        str(seconds),
        "--seed",
        "1",
        "--corpus",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=190)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["inputs"] > len(seeds(name)) + 50, "hardly more than the inputs that it begins with"
    assert result["coverage_edges"] > 50
    assert result["corpus"] > len(seeds(name))


def test_a_machine_that_is_used_again_is_as_new() -> None:
    """Rows of calls on the machine that all inputs share, in any order, have the answers that they have on a machine of their own."""
    rng = random.Random(4)
    rows = [seed * 3 + rng.randbytes(120) for seed in seeds("hypercalls")[::9]]
    rows += [rng.randbytes(300) for _ in range(20)]

    def results(row: bytes, core: WholeCore) -> tuple[object, ...]:
        run_calls(Bytes(row), core)
        written = {
            mfn: bytes(core.memory.page(mfn))
            for mfn in sorted(core.memory.touched)
            if core.core.frames.owner(Mfn(mfn)) is not None
        }
        return (
            dict(core.replies),
            core.now,
            core.core.frames.free_pages,
            list(core.grants.references()),
            written,
        )

    shared = ready()
    alone = [results(row, WholeCore()) for row in rows]
    assert len({str(each[0]) for each in alone}) > 10, "they do different things"
    for _ in range(2):
        order = list(range(len(rows)))
        rng.shuffle(order)
        for at in order:
            assert results(rows[at], shared.new()) == alone[at]
