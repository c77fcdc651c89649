"""How these tests start the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

COMMAND = [sys.executable, "-m", "toolstack.cli"]
TIMEOUT_S = 60
Domicile = Callable[..., "subprocess.CompletedProcess[bytes]"]


def run_command(*arguments: str, timeout: float = TIMEOUT_S) -> subprocess.CompletedProcess[bytes]:
    """Its exit status and what it wrote; standard input is closed."""
    return subprocess.run(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
    )
