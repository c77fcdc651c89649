"""`domicile run`: a whole machine for one guest, its console, exit statuses, the record, the terminal."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from tests.integration.cli.cli_command import COMMAND, Domicile
from toolstack.errors import MachineError

Programs = Callable[[str], Path]


@pytest.fixture(scope="session")
def grub() -> str:
    """Debian's GRUB for Xen, which nobody here wrote."""
    from toolstack.guestfetch import FetchError, fetch

    try:
        return str(fetch("grub").kernel)
    except (FetchError, MachineError) as error:
        pytest.skip(f"GRUB cannot be had here: {error}")


def test_a_guest_prints_its_line_and_powers_off(domicile: Domicile, guest_programs: Programs) -> None:
    """Status 0; standard output is the console and nothing else."""
    done = domicile("run", str(guest_programs("hello")), "--timeout", "30")
    assert done.stderr == b""
    assert done.returncode == 0
    assert b"hello from a Xen guest" in done.stdout
    assert b"domicile" not in done.stdout


def test_root_of_a_user_namespace_runs_a_guest_and_is_told_what_is_missing(
    guest_programs: Programs,
) -> None:
    """As in a rootless container: there are no user ids to give."""
    space = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*space, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("this host allows no user namespaces")
    done = subprocess.run(
        [*space, *COMMAND, "run", str(guest_programs("hello")), "--timeout", "30"],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"hello from a Xen guest" in done.stdout
    told = subprocess.run([*space, *COMMAND, "doctor"], capture_output=True, timeout=60).stdout
    assert b"root of a user namespace that has no user ids 1600000000 to" in told


def test_the_record_is_the_last_line_of_standard_output(
    domicile: Domicile, guest_programs: Programs, tmp_path: Path
) -> None:
    """Reason, seconds, console bytes and what the guest called are there."""
    file = tmp_path / "record.json"
    done = domicile("run", str(guest_programs("hello")), "--name", "h", "--json", "--json-file", str(file))
    assert done.returncode == 0, done.stderr
    in_file = json.loads(file.read_text())
    assert in_file["reason"] == "poweroff"
    done = domicile("run", str(guest_programs("hello")), "--name", "h", "--json")
    *console, last = done.stdout.splitlines(keepends=True)
    record = json.loads(last)
    assert record["name"] == "h"
    assert record["exit_status"] == 0
    assert record["console_bytes"] == len(b"".join(console))
    assert 0 < record["seconds_guest"] < record["seconds"]
    assert record["hypercalls"]["sched_op"] >= 1
    assert record["not_counted"] == []


def test_grub_answers_what_is_typed(domicile: Domicile, grub: str) -> None:
    """Pairs of --expect and --send drive GRUB's command line; `halt` powers off: status 0."""
    done = domicile(
        *("run", grub, "--timeout", "40"),
        *("--expect", "grub> $", "--send", r"echo a-$grub_cpu-b\r"),
        *("--expect", "grub> $", "--send", r"halt\r"),
    )
    assert done.returncode == 0, done.stderr
    assert b"GNU GRUB" in done.stdout
    assert b"a-x86_64-b" in done.stdout  # the keys' own echo has the variable's name


def test_a_disk_reaches_the_guest(domicile: Domicile, grub: str, tmp_path: Path) -> None:
    """GRUB reads a file of an ext4 image through the driver domain; an image that is not there is named."""
    directory, image = tmp_path / "tree", tmp_path / "disk.img"
    directory.mkdir()
    (directory / "note.txt").write_text("words from a disk\n")
    mke2fs = ["/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(directory), str(image), "8M"]
    subprocess.run(mke2fs, check=True, capture_output=True)
    done = domicile(
        *("run", grub, "--timeout", "50", "--disk", f"{image},raw,xvda,r", "--until", "words from a disk"),
        *("--expect", "grub> $", "--send", r"cat (xen/xvda)/note.txt\r"),
    )
    assert done.returncode == 0, done.stderr
    done = domicile("run", grub, "--disk", "/nope,raw,xvda,r")
    assert (done.returncode, done.stderr) == (2, b"domicile: disk /nope: no such file\n")


def test_until_ends_a_guest_that_would_go_on(domicile: Domicile, grub: str) -> None:
    """Status 0 as soon as the pattern is there."""
    done = domicile("run", grub, "--until", "grub>", "--timeout", "40", "-q", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["matched"] == "grub>"
    assert record["hypercalls"]["event_channel_op"] > 0, "of a guest that still ran"
    assert record["not_counted"] == []


def test_timeout_is_124_and_says_what_was_waited_for(domicile: Domicile, grub: str) -> None:
    """And where the guest was. The machine is gone afterwards (the fixture looks)."""
    done = domicile("run", grub, "--until", "never shown", "--timeout", "4", "-q")
    assert done.returncode == 124
    first, place = done.stderr.splitlines()
    assert first == b"domicile: grub-x86_64-xen: timeout after 4 s ('never shown' was not seen)"
    assert re.fullmatch(rb"vcpu 0: (running|blocked), kernel, RIP e033:\[<[0-9a-f]{16}>\]", place)


def test_timeout_holds_where_nobody_takes_standard_output(grub: str) -> None:
    """A pipe that is full from the start, and whose reader sleeps."""
    read, write = os.pipe()
    os.write(write, bytes(fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)))
    try:
        done = subprocess.run(
            [*COMMAND, "run", grub, "--timeout", "4"],
            stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, timeout=40, check=False,
        )  # fmt: skip
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 124
    assert b"timeout after 4 s" in done.stderr


def test_a_signal_takes_everything_down(grub: str) -> None:
    """^C from outside is 130, SIGTERM 143: no process is left."""
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen([*COMMAND, "run", grub], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.read(1)  # it writes: the guest runs
        process.send_signal(number)
        assert process.wait(20) == status
        process.stdout.close()


def test_killed_the_command_leaves_nothing(grub: str) -> None:
    """SIGKILL cannot be caught: the warden sees its owner go, and ends the machine."""
    process = subprocess.Popen([*COMMAND, "run", grub], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.kill()
    process.wait(20)
    process.stdout.close()


def test_a_terminal_is_the_guests_and_comes_back(grub: str) -> None:
    """Keys reach GRUB, its answer the screen; ^] ends with 130; the terminal's settings are restored."""
    shell = pexpect.spawn(
        "/bin/sh",
        ["-c", "stty -a >&2; " + " ".join([*COMMAND, "run", grub]) + "; echo status=$?; stty -a"],
        timeout=40,
    )
    try:
        shell.expect("grub>")
        before = shell.before or b""
        shell.send("echo typed-here\r")
        shell.expect(
            "\n\r?typed-here"
        )  # GRUB's echo of the keys is full of cursor movements; its answer is not
        shell.send("\x1d")
        shell.expect("status=130")
        shell.expect(pexpect.EOF)
        after = shell.before or b""
    finally:
        shell.close(force=True)
    for setting in (b"icanon", b"echo", b"isig", b"icrnl", b"opost"):
        assert setting in before.split()
        assert setting in after.split()


def test_the_whole_run_of_a_small_guest_is_quick(domicile: Domicile, guest_programs: Programs) -> None:
    """The figure (1.5 s on two free cores) is the benchmarks' to hold; this is where others may run beside it: the best of three
    is under twice that."""
    kernel = str(guest_programs("hello"))
    times = []
    for _ in range(3):
        start = time.monotonic()
        assert domicile("run", kernel).returncode == 0
        times.append(time.monotonic() - start)
    assert min(times) < 3.0, times


def test_a_guest_joins_a_machine_that_runs_already(domicile: Domicile, machine: str, grub: str) -> None:
    """Its own guest is taken down at the end, whatever the end; the machine and others' guests stay."""
    done = domicile(
        "-M", machine, "run", "--join", grub, "--until", "grub>", "--name", "mine", "-q", "--timeout", "30"
    )
    assert done.returncode == 0, done.stderr.decode()
    done = domicile("-M", machine, "list")
    assert [line.split()[0] for line in done.stdout.decode().splitlines()[1:]] == ["Domain-0"]
    done = domicile("-M", "nobody", "run", "--join", grub)
    assert done.returncode == 1
    assert b"no machine runs" in done.stderr
