"""Debian's xenstore-utils against the socket server: they prove the wire protocol, as nobody here wrote
them."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from domains.dom0.xenstore.core import Core
from domains.dom0.xenstore.socket_server import SocketServer, listen, serve

TOOLS = ("read", "write", "ls", "rm", "list", "chmod", "watch", "exists")
Tool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    missing = [name for name in TOOLS if shutil.which(f"xenstore-{name}") is None]
    assert not missing, f"xenstore-{missing[0]} is missing: install Debian's package xenstore-utils"
    path = tmp_path / "socket"
    server = SocketServer(Core(), listen(path))
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(server, stop.is_set, 0.01))
    thread.start()
    yield path
    stop.set()
    thread.join(10)
    server.close()
    assert not thread.is_alive()


@pytest.fixture
def tool(socket_path: Path) -> Tool:
    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [f"xenstore-{name}", *arguments],
            env={**os.environ, "XENSTORED_PATH": str(socket_path)},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    return run


def test_write_read_list_ls_and_exists(tool: Tool) -> None:
    assert tool("write", "/vm/1/name", "guest", "/vm/1/memory", "256").returncode == 0
    assert tool("read", "/vm/1/name").stdout == "guest\n"
    assert tool("list", "/vm/1").stdout == "name\nmemory\n"
    assert tool("ls", "/vm").stdout == '1 = ""\n name = "guest"\n memory = "256"\n'
    assert tool("exists", "/vm/1/name").returncode == 0
    assert tool("exists", "/vm/2").returncode == 1


def test_read_of_a_missing_node_fails_as_with_xen(tool: Tool) -> None:
    missing = tool("read", "/nothing")
    assert missing.returncode != 0
    assert "couldn't read path /nothing" in missing.stderr


def test_rm_and_chmod_with_permissions_shown(tool: Tool) -> None:
    tool("write", "/a/b", "1")
    assert tool("chmod", "/a/b", "n0", "r5", "b7").returncode == 0
    assert "(n0,r5,b7)" in tool("ls", "-p", "/a").stdout
    assert tool("rm", "/a").returncode == 0
    assert tool("exists", "/a/b").returncode == 1


def test_ls_of_a_directory_longer_than_one_message(tool: Tool) -> None:
    names = [f"a-rather-long-name-of-a-node-{number:04}" for number in range(200)]
    for start in range(0, 200, 50):
        tool("write", *[word for name in names[start : start + 50] for word in (f"/big/{name}", "x")])
    assert tool("list", "/big").stdout.split() == names


def test_rundir_variable_is_honoured_too(tool: Tool, socket_path: Path) -> None:
    tool("write", "/x", "1")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XENSTORED")}
    environment["XENSTORED_RUNDIR"] = str(socket_path.parent)
    shown = subprocess.run(
        ["xenstore-read", "/x"], env=environment, capture_output=True, timeout=20, check=True
    )
    assert shown.stdout == b"1\n"


def test_watch_reports_registration_and_then_the_change(tool: Tool, socket_path: Path) -> None:
    with subprocess.Popen(
        ["xenstore-watch", "-n", "2", "/watched"],
        env={**os.environ, "XENSTORED_PATH": str(socket_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "/watched\n"
        tool("write", "/watched/below", "1")
        assert watcher.stdout.readline() == "/watched/below\n"
        assert watcher.wait(20) == 0
