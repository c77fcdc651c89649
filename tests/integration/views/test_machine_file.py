"""`domicile up FILE.toml`: the whole set-up comes up, or nothing does."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from toolstack.guestfetch import fetch

pytestmark = pytest.mark.timeout(120)


def domicile(machine: str, *words: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "toolstack.cli", "-M", machine, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_set_up_comes_up_whole_or_not_at_all(tmp_path: Path) -> None:
    machine = f"file-{secrets.token_hex(3)}"
    os.symlink(fetch("grub").kernel, tmp_path / "grub")
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "b.cfg").write_text('name="b"\nkernel="grub"\nmemory=64\n')
    text = (
        '[machine]\nmemory = 1024\ncpus = 2\n[[domain]]\nname = "a"\nkernel = "grub"\nmemory = 64\n'
        'disk = ["disk.img,raw,xvda,w"]\n[[domain]]\nconfig = "b.cfg"\npaused = true\n'
    )
    file = tmp_path / "m.toml"
    file.write_text(text + '[[domain]]\nname = "c"\nkernel = "grub"\nmemory = 4000\n')
    said = domicile(machine, "up", str(file), status=1)  # more memory than the machine has
    assert "domain c: " in said
    assert "the machine is taken down again" in said
    domicile(machine, "list", status=1)
    file.write_text(text)
    try:
        lines = domicile(machine, "up", str(file)).splitlines()
        assert lines[0].endswith(": 1024 MB")
        assert lines[1:] == ["domain 1: a", "domain 3: b (paused)"]  # 2 is DomIO, for a's disk
        rows = {line.split()[0]: line.split()[4] for line in domicile(machine, "list").splitlines()[1:]}
        assert set(rows) == {"Domain-0", "a", "DomIO", "b"}
        assert "p" in rows["b"]
        assert "51712" in domicile(machine, "block-list", "a")
    finally:
        domicile(machine, "down")
