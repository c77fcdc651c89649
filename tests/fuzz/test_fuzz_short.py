"""Each fuzzer for two seconds from a fixed seed: that it runs, is guided by coverage, and finds nothing. `./devtool fuzz` runs longer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import NAMES
from tests.fuzz.targets import TARGETS, seeds

pytest.importorskip("atheris", reason="no atheris for this Python")


def test_every_target_has_a_name() -> None:
    """The command's list is that of the functions; each takes its own seeds, no input, and one byte."""
    assert set(NAMES) == set(TARGETS)
    for name, target in TARGETS.items():
        for data in [b"", b"\xff", *seeds(name)[:20]]:
            target(data)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", NAMES)
def test_two_seconds_find_nothing(name: str, tmp_path: Path) -> None:
    """And some inputs reached something new, or the run proves nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "--seconds", "2", "--seed", "1", "--corpus", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["inputs"] > 50
    assert result["coverage_edges"] > 50
    assert result["corpus"] > len(seeds(name)) or name == "hypercalls"
