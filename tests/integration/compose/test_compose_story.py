"""The compose file's services on the real engine: what confines them, that the story ends well, that a machine answers and can be killed.

Needs the image (`./devtool image`); left out where there is no engine or no image of this name.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

docker = pytest.importorskip("docker")
REPO = Path(__file__).parents[3]
IMAGE = os.environ.get("DOMICILE_IMAGE", "domicile:latest")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _compose() -> list[str]:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither `docker compose` nor docker-compose is here")


@pytest.fixture(scope="module")
def engine() -> Any:
    """The Docker engine, with the image."""
    try:
        client = docker.from_env()
        client.images.get(IMAGE)
    except docker.errors.ImageNotFound:
        pytest.skip(f"no image {IMAGE}: ./devtool image")
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine: {error}")
    return client


class Composed:
    """A project of compose.yaml."""

    def __init__(self, engine: Any) -> None:
        self.name = f"domicile-test-{secrets.token_hex(3)}"
        self._engine = engine

    def run(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """A command of compose."""
        command = [*_compose(), "-p", self.name, "-f", str(REPO / "compose.yaml"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, cwd=REPO
        )  # fmt: skip

    def container(self, service: str) -> Any:
        """The container of a service."""
        labels = [f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}"]
        (found,) = self._engine.containers.list(all=True, filters={"label": labels})
        return found

    def healthy(self, service: str, timeout: float = 90.0) -> Any:
        """The container, once its health check passes."""
        deadline = time.monotonic() + timeout
        while True:
            container = self.container(service)
            health = container.attrs["State"].get("Health", {}).get("Status")
            if health == "healthy":
                return container
            assert time.monotonic() < deadline, (health, container.logs()[-2000:])
            select.select([], [], [], 0.5)


@pytest.fixture
def composed(engine: Any) -> Iterator[Composed]:
    """A project that is gone afterwards."""
    project = Composed(engine)
    yield project
    project.run("down", "--volumes", "--timeout", "10")


def test_the_story_ends_well_and_its_exit_status_is_the_result(composed: Composed) -> None:
    """`up --exit-code-from story` from nothing to the summary, in a container that is confined as the file says."""
    done = composed.run("up", "--no-color", "--exit-code-from", "story")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert re.search(r"all well: 9 of 9 steps", done.stdout)
    story = composed.container("story")
    host = story.attrs["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["NetworkMode"] == "none"
    assert not host["Privileged"]
    assert host["CapDrop"] == ["ALL"]
    assert {cap.removeprefix("CAP_") for cap in host["CapAdd"]} == {
        "SETUID",
        "SETGID",
        "SETPCAP",
        "CHOWN",
        "KILL",
    }
    assert host["Memory"] > 0
    assert not [option for option in host["SecurityOpt"] if "seccomp" in option], (
        "not the default seccomp profile"
    )


def test_a_machine_answers_is_killed_and_comes_back(composed: Composed) -> None:
    """The health check passes; each process has a uid of its own without a capability; SIGKILL to the hypervisor ends the machine, and
    the restart policy brings a new one."""
    done = composed.run("up", "-d", "machine")
    assert done.returncode == 0, done.stderr
    machine = composed.healthy("machine")
    status, output = machine.exec_run(["domicile", "list"])
    assert status == 0
    assert b"Domain-0" in output
    look = (
        "import glob,json; rows=[]\n"
        "for d in glob.glob('/proc/[0-9]*'):\n"
        "    words=open(d+'/cmdline','rb').read().split(b'\\0')\n"
        "    role=[w.decode() for w in words if w.startswith(b'domicile-')]\n"
        "    f=dict(l.split(':\\t',1) for l in open(d+'/status') if ':\\t' in l)\n"
        "    if role: rows.append([role[0], int(d[6:]), int(f['Uid'].split()[0]), int(f['CapEff'],16), int(f['CapBnd'],16)])\n"
        "print(json.dumps(rows))"
    )
    status, output = machine.exec_run(["/opt/domicile/bin/python", "-c", look])
    assert status == 0, output
    rows = json.loads(output)
    workers = [row for row in rows if row[0] in ("domicile-hypervisor", "domicile-dom0")]
    assert len(workers) == 2
    assert len({row[2] for row in workers}) == 2
    assert all(row[2] != 0 and row[3] == 0 and row[4] == 0 for row in workers)
    started = machine.attrs["State"]["StartedAt"]
    (hypervisor,) = [row[1] for row in rows if row[0] == "domicile-hypervisor"]
    status, output = machine.exec_run(["sh", "-c", f"kill -9 {hypervisor}"])
    assert status == 0, output
    deadline = time.monotonic() + 60
    while composed.container("machine").attrs["State"]["StartedAt"] == started:
        assert time.monotonic() < deadline, "it was not started again"
        select.select([], [], [], 0.5)
    status, output = composed.healthy("machine").exec_run(["domicile", "list"])
    assert status == 0
    assert b"Domain-0" in output
