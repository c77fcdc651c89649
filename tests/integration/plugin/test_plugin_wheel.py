"""The pytest plugin as a stranger gets it: from a built wheel, in a project outside of this repository."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import pytest

from toolstack.demo.guest import GREETING, get_files
from toolstack.guestfetch import fetch

pytestmark = pytest.mark.timeout(240)
REPO = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel: the package and its entry points, and nothing else of the repository."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    for package in ("bus", "hypervisor", "domains", "drivers", "simulation", "toolstack", "guests"):
        shutil.copytree(REPO / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(base), str(source)], check=True, timeout=200, cwd=base)
    (wheel,) = base.glob("domicile-*.whl")
    # An environment whose first packages are the wheel's, and whose others are this one's: the repository itself is not on its path,
    # for its entry there is a .pth file, which counts in an environment's own directory alone.
    environment = base / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    shutil.unpack_archive(wheel, base / "site", "zip")
    (site / "wheel.pth").write_text(f"{base / 'site'}\n{sysconfig.get_path('purelib')}\n")
    return environment / "bin" / "python"


class Project:
    """A directory with tests, run by a pytest of its own that knows the wheel alone."""

    def __init__(self, python: Path, directory: Path) -> None:
        self.python = python
        self.directory = directory / "project"
        self.directory.mkdir()

    def write(self, text: str, name: str = "test_it.py") -> None:
        """A file of tests."""
        (self.directory / name).write_text(text)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit status and output."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            [str(self.python), "-P", "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", ".", "-ra", *arguments],
            cwd=self.directory, env=environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(installed: Path, tmp_path: Path) -> Project:
    """A project of somebody else's."""
    return Project(installed, tmp_path)


def test_the_code_is_the_wheels(project: Project) -> None:
    """Else the tests below would prove nothing of the wheel."""
    done = subprocess.run(
        [str(project.python), "-P", "-c", "import toolstack, domains.dom0; print(toolstack.__file__, domains.__file__)"],
        cwd="/", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert str(REPO) not in done.stdout


def test_the_example_passes_from_the_wheel(project: Project) -> None:
    """examples/grub-test as it is, and it is under 20 lines."""
    example = (REPO / "examples" / "grub-test" / "test_grub.py").read_text()
    assert len(example.splitlines()) < 20
    project.write(example, "test_grub.py")
    status, output = project.run()
    assert status == 0, output
    assert "1 passed" in output


FAILS = """
from toolstack.guestfetch import fetch
import pytest

@pytest.mark.pv
def test_expects_too_much(domain):
    guest = domain(fetch("grub").kernel, name="stranger")
    guest.console.expect("grub> ")
    guest.console.sendline("echo seen-$((1+1)) by-the-tail")
    guest.console.expect("never printed", timeout=1)
"""


def test_a_failure_shows_the_consoles_tail_and_keeps_artefacts(project: Project) -> None:
    """The pattern, the tail, and files in the directory that was asked for."""
    project.write(FAILS)
    status, output = project.run("--domicile-artifacts", "kept", "--strict-markers")
    assert status == 1, output
    assert "expected 'never printed': nothing like it within 1 s" in output
    assert "by-the-tail" in output
    (kept,) = (project.directory / "kept").iterdir()
    assert "by-the-tail" in (kept / "console-stranger.txt").read_text()
    assert (kept / "dmesg.txt").exists()


HVM = """
from pathlib import Path
import pytest

@pytest.mark.hvm
def test_looks_at_a_screen(domain):
    guest = domain("", name="pc", type="hvm", memory_mb=32, serial=True)
    guest.console.expect("No bootable device")
    Path("taken.png").write_bytes(guest.screenshot())
    guest.console.expect("never printed", timeout=1)

@pytest.mark.pv
def test_has_no_screen(domain):
    from toolstack.errors import MachineError
    from toolstack.guestfetch import fetch
    with pytest.raises(MachineError, match="no screen"):
        domain(fetch("grub").kernel).screenshot()
"""


def letters(png: Path) -> int:
    """How many pixels of a picture of text are lit."""
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (720, 400)
    at = data.index(b"IDAT")
    (size,) = struct.unpack(">I", data[at - 4 : at])
    lines = zlib.decompress(data[at + 4 : at + 4 + size])
    assert len(lines) == 400 * (1 + 3 * 720)
    return sum(
        bool(any(lines[pixel : pixel + 3]))
        for line in range(400)
        for pixel in range(line * 2161 + 1, (line + 1) * 2161, 3)
    )


def test_a_failure_keeps_the_screen_of_an_hvm_guest(project: Project) -> None:
    """As it was: what the firmware wrote."""
    project.write(HVM)
    status, output = project.run("-n", "2", "--domicile-artifacts", "kept", "--strict-markers")
    assert status == 1, output
    assert "1 failed, 1 passed" in output
    (screen,) = (project.directory / "kept").rglob("screen-*.png")
    assert screen.name == "screen-pc.png"
    assert f"kept in {Path('kept') / screen.parent.name}: " in output
    assert screen.name in output
    assert 1000 < letters(screen) < 60000, "letters on black"
    assert letters(project.directory / "taken.png") == pytest.approx(
        letters(screen), abs=200
    )  # but for the cursor


def test_the_wheel_holds_domio_as_a_guest_program(installed: Path, tmp_path: Path) -> None:
    """Built, and a guest finds its disk behind it."""
    disk = get_files(tmp_path).disk
    name, text = GREETING
    command = [
        str(installed),
        "-P",
        "-m",
        "toolstack.cli",
        "run",
        str(fetch("grub").kernel),
        "--domio",
        "guest",
        "--timeout",
        "100",
    ]
    script = ["--expect", "grub> $", "--send", rf"cat (xen/xvda)/{name}\r", "--until", text]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DOMICILE_DOMIO")
    }
    environment["XDG_CACHE_HOME"] = str(tmp_path)  # nothing of what this checkout has built is found
    done = subprocess.run(
        [*command, "--disk", f"{disk},raw,xvda,w", *script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


SHARED = """
from toolstack.guestfetch import fetch
import pytest

seen = []

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.domicile_scope("session")
def test_shares(machine, domain, console, number):
    seen.append(machine)
    assert all(one is machine for one in seen)
    assert machine.domains == {}
    domain(fetch("grub").kernel, name="same-name")
    console("same-name").expect("grub> ")

def test_has_its_own(machine):
    assert machine not in seen

def test_an_end_is_told_at_once(domain, tmp_path):
    guest = domain(fetch("grub").kernel)
    guest.console.expect("grub> ")
    guest.console.send("halt\\r")
    with pytest.raises(AssertionError, match="the guest ended: poweroff"):
        guest.console.expect("never", timeout=30)

def test_a_kernel_that_is_none(domain, tmp_path):
    from toolstack.errors import MachineError
    (tmp_path / "k").write_bytes(b"no kernel")
    with pytest.raises(MachineError):
        domain(tmp_path / "k")
"""


def test_scopes_ends_and_bad_input_with_xdist(project: Project) -> None:
    """A shared machine gives each test an empty house; two workers do not get into each other's way."""
    project.write(SHARED)
    status, output = project.run("-n", "2", "--dist", "loadgroup")
    assert status == 0, output
    assert "5 passed" in output
