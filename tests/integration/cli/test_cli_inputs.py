"""Bad input: one line on standard error that names the thing, status 2 (1 where the machine is not there), no traceback,
and no machine is started for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.cli.cli_command import Domicile


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "/nope"], ["kernel /nope", "no such file"]),
        (["run", "/etc"], ["kernel /etc", "not a regular file"]),
        (["run", "{text}"], ["{text}"]),
        (["run", "{text}", "--ramdisk", "/nope"], ["ramdisk /nope", "no such file"]),
        (["run", "{text}", "--memory", "0"], ["--memory"]),
        (["run", "{text}", "--vcpus", "many"], ["--vcpus"]),
        (["run", "{text}", "--type", "xen"], ["--type xen", "pv, pvh, hvm"]),
        (["run", "{text}", "--until", "("], ["--until", "regular expression"]),
        (["run", "{text}", "--input", "\\q"], ["--input", "escape"]),
        (["run", "{text}", "--expect", "a"], ["--expect 'a'", "--send"]),
        (["run", "{text}", "--send", "a"], ["--send 'a'", "--expect"]),
        (["run", "{text}", "--disk", "x"], ["--disk", "vdev"]),
        (["run", "{text}", "--domio", "linux"], ["--domio 'linux'", "native, guest"]),
        (["run", "{text}", "--name", "a b"], ["name 'a b'"]),
        (["run", "{text}", "--tiemout", "1"], ["--tiemout"]),
        (["run", "{text}", "--pvshim"], ["--pvshim", "--type pvh"]),
        (["run", "{text}", "--cmdline", "x" * 5000], ["cmdline=", "5002 characters", "4096"]),
        (["run"], ["KERNEL"]),
        (["frobnicate"], ["frobnicate"]),
        (["-M", "../x", "list"], ["machine name"]),
        (["create", "/nope"], ["/nope", "No such file"]),
        (["create", "{text}"], ["{text}:1:"]),
        (["domname", "x"], ["domname 'x'"]),
        (["sched-credit2", "-w", "5"], ["-d DOMAIN"]),
        (["xenstore-write", "/a"], ["/a", "value"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    domicile: Domicile, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    """Whatever was wrong, the line names it."""
    text = tmp_path / "readme.txt"
    text.write_text("this is neither a kernel nor a configuration\n")
    done = domicile(*[word.format(text=text) for word in arguments])
    told = done.stderr.decode()
    assert done.returncode == 2, told
    assert told.count("\n") == 1, told
    assert told.startswith("domicile: ")
    for word in words:
        assert word.format(text=text) in told


@pytest.mark.parametrize(
    "verb", ["list", "info", "dmesg", "uptime", "vcpu-list", "down", "xenstore-ls", "shutdown x", "destroy x"]
)
def test_without_a_machine_the_mend_is_told(domicile: Domicile, verb: str) -> None:
    """Status 1."""
    done = domicile("-M", "absent", *verb.split())
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"no machine runs at" in done.stderr


def test_help_is_quick_to_read_and_names_the_exit_codes(domicile: Domicile) -> None:
    """Every verb of the issue is in the help; the statuses are in its end."""
    text = domicile("--help").stdout.decode()
    for verb in (
        *(
            "up",
            "down",
            "create",
            "list",
            "vcpu-list",
            "console",
            "shutdown",
            "reboot",
            "destroy",
            "pause",
            "unpause",
        ),
        *("domid", "domname", "dmesg", "info", "uptime", "sched-credit2", "xenstore-ls", "xenstore-read"),
        *("xenstore-write", "xenstore-rm", "xenstore-watch", "run", "guest", "doctor", "version"),
    ):
        assert f"  {verb} " in text
    assert "124 timeout" in " ".join(text.split())


def test_an_output_that_nobody_reads_is_no_traceback(domicile: Domicile) -> None:
    """`domicile doctor | true`."""
    import subprocess

    from tests.integration.cli.cli_command import COMMAND

    process = subprocess.Popen([*COMMAND, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    process.wait(20)
    assert b"Traceback" not in told
    assert b"Exception" not in told
