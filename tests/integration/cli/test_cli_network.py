"""Network interfaces by the command: xl.cfg's vif=, network-attach, network-list, network-detach, run --net, top."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.integration.cli.cli_command import Domicile

HEAD = "Idx BE Mac Addr.         handle state evt-ch   tx-/rx-ring-ref BE-path                       "
ROW = re.compile(
    r"(\d+) +(\d+) +([0-9a-f:]{17}) +(\d+) +(\d+) +(-?\d+) +(-?\d+)/(-?\d+) +(/local/domain/\d+/backend/vif/\d+/\d+) *"
)


def test_interfaces_of_a_guest_from_its_file_to_their_end(
    domicile: Domicile, machine: str, tmp_path: Path, guest_programs: Callable[[str], Path]
) -> None:
    """The output is xl's, column by column; xenstore has libxl's nodes; a guest that does not let go is told."""
    config = tmp_path / "web.cfg"
    config.write_text(
        f"name = 'web'\nkernel = \"{guest_programs('net')}\"\nmemory = 32\nvif = ['mac=00:16:3e:00:00:07,bridge=br7,rate=1MB/s', '']\n"
    )

    def ask(*words: str, status: int = 0) -> str:
        done = domicile("-M", machine, *words)
        assert done.returncode == status, done.stderr.decode()
        return (done.stdout if status == 0 else done.stderr).decode()

    ask("create", "-p", str(config))
    number = ask("domid", "web").strip()
    head, *rows = ask("network-list", "web").splitlines()
    assert head == HEAD
    found = [ROW.fullmatch(row) for row in rows]
    assert all(found), rows
    first, second = (match.groups() for match in found if match is not None)
    assert (first[0], first[2], first[3], first[5], first[6]) == ("0", "00:16:3e:00:00:07", "0", "-1", "-1")
    assert second[2].startswith("00:16:3e:")
    back = first[8]
    assert back.endswith(f"/backend/vif/{number}/0")
    for node, value in (
        ("bridge", "br7"),
        ("rate", "50000,50000"),
        ("hotplug-status", "connected"),
        ("state", "2"),
    ):
        assert ask("xenstore-read", f"{back}/{node}") == f"{value}\n"
    assert ask("xenstore-read", f"/local/domain/{number}/device/vif/0/backend") == f"{back}\n"
    ask("network-attach", "web", "mac=00:16:3e:00:00:09", "bridge=br9")
    assert len(ask("network-list", "web").splitlines()) == 4
    assert "model" in ask("network-attach", "web", "model=e1000", status=1)
    assert "bridge" in ask("network-attach", "web", "bridge=a/b", status=1)
    assert "no vif 9" in ask("network-detach", "web", "9", status=1)
    ask("network-detach", "--force", "web", "00:16:3e:00:00:09")
    assert len(ask("network-list", "web").splitlines()) == 3
    ask("unpause", "web")
    table = ask("top", "--batch", "--iterations", "1")
    (line,) = (line for line in table.splitlines() if line.split()[:1] == ["web"])
    assert "NETS NETTX(k) NETRX(k)" in table
    assert line.split()[9] == "2", line
    ask("destroy", "web")
    assert "not exist" in ask("network-list", "web", status=1)


def test_run_with_an_interface(domicile: Domicile, guest_programs: Callable[[str], Path]) -> None:
    """A kernel that needs a network gets one by --net, or --vif; one that cannot be had is refused in one line."""
    kernel = str(guest_programs("net"))
    done = domicile("run", kernel, "--net", "--until", "net: up", "--timeout", "60")
    assert done.returncode == 0, done.stderr.decode()
    assert b"ok 1 - the node mac is an address of one station" in done.stdout
    assert b"not ok" not in done.stdout
    refused = domicile("run", kernel, "--vif", "model=e1000", "--timeout", "60")
    assert refused.returncode == 2
    assert re.fullmatch(rb"domicile: [^\n]*emulated network card[^\n]*\n", refused.stderr), refused.stderr
    wrong = domicile("run", kernel, "--vif", "colour=red")
    assert wrong.returncode == 2
    assert wrong.stderr.count(b"\n") == 1
