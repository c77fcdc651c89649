"""xl's verbs on a machine that is up."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from guests.build import build
from tests.integration.cli.cli_command import COMMAND, Domicile


@pytest.fixture
def guest(domicile: Domicile, machine: str, tmp_path: Path, guest_programs: Callable[[str], Path]) -> str:
    """A paused guest made from an xl.cfg: it has its first instruction before it."""
    config = tmp_path / "web.cfg"
    config.write_text(
        f"name = 'web'\nkernel = \"{guest_programs('hello')}\"\nmemory = 32 # MB\nvnc = 1\non_poweroff = 'preserve'\n"
    )
    done = domicile("-M", machine, "create", "-p", str(config))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == f"Parsing config from {config}\n".encode()
    assert b"vnc: only for HVM guests" in done.stderr
    return "web"


def test_a_machine_comes_up_is_listed_and_goes_down(domicile: Domicile, machine: str) -> None:
    """list, list -l, info, uptime and dmesg answer; a second `up` of the same name is refused."""

    def ask(*words: str) -> str:
        done = domicile("-M", machine, *words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    header, dom0 = ask("list").splitlines()
    assert header == "Name                                        ID   Mem VCPUs\tState\tTime(s)"
    assert dom0.split()[:2] == ["Domain-0", "0"]
    (entry,) = json.loads(ask("list", "-l"))
    assert entry["config"]["c_info"]["name"] == "Domain-0"
    info = dict(line.split(":", 1) for line in ask("info").splitlines())
    assert info["total_memory           "].strip() == "512"
    isolated = "a uid of its own" if os.getuid() == 0 else "UNENFORCED"
    assert isolated in info["domicile_isolation     "]
    assert json.loads(ask("info", "--json"))["xen_major"] == 4
    caps = next(value for name, value in info.items() if name.strip() == "xen_caps")
    assert caps.split() == ["xen-3.0-x86_64", "hvm-3.0-x86_32", "hvm-3.0-x86_32p", "hvm-3.0-x86_64"]
    virt = next(value for name, value in info.items() if name.strip() == "virt_caps")
    assert set(virt.split()) >= {"pv", "hvm", "hap", "shadow"}
    assert ask("uptime").splitlines()[1].split()[:2] == ["Domain-0", "0"]
    ask("dmesg", "-c")
    assert ask("domid", "Domain-0") == "0\n"
    again = domicile("-M", machine, "up")
    assert again.returncode == 1
    assert b"runs already" in again.stderr


def test_a_guest_from_creation_to_its_end(domicile: Domicile, machine: str, guest: str) -> None:
    """Paused, named, numbered, unpaused, ended, destroyed; a second one of that name is refused."""

    def ask(*words: str) -> str:
        done = domicile("-M", machine, *words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    number = ask("domid", guest).strip()
    assert ask("domname", number) == "web\n"
    row = ask("list", guest).splitlines()[1].split()
    assert row[:3] == ["web", number, "32"]
    assert "p" in row[4]
    assert ask("vcpu-list", guest).splitlines()[1].split()[:3] == ["web", number, "0"]
    (first,) = json.loads(ask("registers", guest, "--json", "--symbols", str(build("hello"))))
    assert (first["vcpu"], first["mode"], first["cs"]) == (0, "kernel", 0xE033)
    assert first["function"].endswith("+0x0"), "paused before its first instruction"
    assert f"RIP e033:[<{first['rip']:016x}>]" in ask("registers", guest, "0")
    nowhere = domicile("-M", machine, "registers", guest, "1")
    assert (nowhere.returncode, b"vCPU 1 was never started" in nowhere.stderr) == (1, True)
    (entry,) = json.loads(ask("list", "-l", number))
    assert entry["config"]["on_poweroff"] == "preserve"
    assert ask("xenstore-read", f"/local/domain/{number}/name") == "web\n"
    ask("unpause", guest)
    console = pexpect.spawn(COMMAND[0], [*COMMAND[1:], "-M", machine, "console", guest], timeout=20)
    console.expect("hello from a Xen guest")
    console.send("\x1d")
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0
    ask("destroy", guest)
    gone = domicile("-M", machine, "domid", guest)
    assert gone.returncode == 1
    assert b"domain 'web' does not exist: `domicile list`" in gone.stderr


def test_a_shutdown_that_does_not_come_is_124(domicile: Domicile, machine: str, guest: str) -> None:
    """A paused guest does not look at its xenstore."""
    done = domicile("-M", machine, "shutdown", "-w", "--timeout", "0.5", guest)
    assert done.returncode == 124
    assert done.stdout.startswith(b"Shutting down domain ")
    assert b"`domicile destroy` ends it" in done.stderr


def test_xenstore_verbs(domicile: Domicile, machine: str) -> None:
    """Written, read, listed, watched and removed; what is not there is named."""

    def ask(*words: str) -> bytes:
        done = domicile("-M", machine, *words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    watcher = subprocess.Popen(
        [*COMMAND, "-M", machine, "xenstore-watch", "-n", "2", "--timeout", "30", "/tool/t"],
        stdout=subprocess.PIPE,
    )
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == b"/tool/t\n"  # the watch is set
    ask("xenstore-write", "/tool/t/a", "1", "/tool/t/b", "two words")
    assert watcher.stdout.readline().startswith(b"/tool/t/")
    watcher.stdout.close()
    assert watcher.wait(20) == 0
    assert ask("xenstore-read", "-p", "/tool/t/b") == b"/tool/t/b: two words\n"
    assert ask("xenstore-list", "/tool/t") == b"a\nb\n"
    assert ask("xenstore-ls", "-f", "/tool/t") == b'/tool/t/a = "1"\n/tool/t/b = "two words"\n'
    ask("xenstore-rm", "/tool/t")
    gone = domicile("-M", machine, "xenstore-read", "/tool/t/a")
    assert (gone.returncode, gone.stderr) == (1, b"domicile: /tool/t/a: no such node (ENOENT)\n")


def test_a_machine_whose_warden_was_killed_can_be_started_again(domicile: Domicile) -> None:
    """Its socket and directory are left behind; `up` takes no notice of them."""
    import signal

    from toolstack.machine import runtime_directory, warden_pidfd

    assert domicile("-M", "hit", "up").returncode == 0
    pidfd = warden_pidfd(runtime_directory("hit"))
    assert pidfd is not None
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    assert domicile("-M", "hit", "list").returncode == 1
    assert domicile("-M", "hit", "up").returncode == 0
    assert domicile("-M", "hit", "down").returncode == 0
