"""The command as a user has it: a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.cli.cli_command import Domicile, run_command


@pytest.fixture
def domicile() -> Domicile:
    """Runs the command to its end."""
    return run_command


@pytest.fixture
def machine(domicile: Domicile) -> Iterator[str]:
    """A machine that is up; its name."""
    name = "cli"
    done = domicile("-M", name, "up", "--memory", "512")
    assert done.returncode == 0, done.stderr.decode()
    yield name
    done = domicile("-M", name, "down")
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture(scope="session")
def guest_programs() -> Callable[[str], Path]:
    """Builds a conformance guest."""
    from guests.build import GuestBuildError, build

    def made(name: str) -> Path:
        try:
            return build(name)
        except GuestBuildError as error:
            pytest.fail(f"guest {name}: {error}")

    return made
