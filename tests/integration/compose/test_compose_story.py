"""compose.yaml on the real engine: what confines each container, the story, containers that are killed and come back, one's own kernel.

Needs the image (`./devtool image`); left out, with the reason, where there is no engine, no compose, or no image of this name.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.build import build
from tests.integration.network.net_packets import MAC, echo, go_on

docker = pytest.importorskip("docker")
REPO = Path(__file__).parents[3]
IMAGE = os.environ.get("DOMICILE_IMAGE", "domicile:latest")
PYTHON = "/opt/domicile/bin/python"
MACHINE = ("warden", "hypervisor", "dom0", "nvme", "domio", "netio", "domu-pv", "domu-pvh")
GRUB = "/opt/guests/domicile/packages/grub-xen-host/usr/lib/grub-xen/grub-x86_64-xen.bin"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def _compose() -> list[str]:
    if "DOMICILE_COMPOSE" in os.environ:
        return [os.environ["DOMICILE_COMPOSE"]]
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
        self.engine = engine
        self.compose = [*_compose(), "-p", self.name, "-f", str(REPO / "compose.yaml")]
        override = os.environ.get(
            "DOMICILE_COMPOSE_OVERRIDE"
        )  # for those who work on this: code from the work tree
        if override:
            self.compose += ["-f", override]

    def run(
        self, *arguments: str, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A command of compose."""
        return subprocess.run(
            [*self.compose, *arguments],
            capture_output=True, text=True, timeout=timeout, check=False, cwd=REPO, env={**os.environ, **environment},
        )  # fmt: skip

    def container(self, service: str) -> Any:
        """The container of a service."""
        labels = [f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}"]
        (found,) = self.engine.containers.list(all=True, filters={"label": labels})
        return found

    def up(self, *services: str) -> None:
        """These, healthy."""
        done = self.run("up", "-d", *services)
        assert done.returncode == 0, done.stderr
        for service in services:
            self.healthy(service)

    def healthy(self, service: str, timeout: float = 150.0) -> Any:
        """The container, once its health check passes."""
        deadline = time.monotonic() + timeout
        while True:
            container = self.container(service)
            state = container.attrs["State"]
            if state["Running"] and state.get("Health", {}).get("Status") == "healthy":
                return container
            assert time.monotonic() < deadline, (state, container.logs()[-2000:])
            select.select([], [], [], 0.3)

    def python(self, service: str, program: str) -> Any:
        """What a Python program prints, as JSON, in the container of that service, under its uid."""
        status, output = self.container(service).exec_run([PYTHON, "-I", "-c", program])
        assert status == 0, output
        return json.loads(output)


@pytest.fixture
def composed(engine: Any) -> Iterator[Composed]:
    """A project that is gone afterwards, with its containers, volumes and networks."""
    project = Composed(engine)
    yield project
    project.run(
        "--profile",
        "chaos",
        "--profile",
        "kernel",
        "--profile",
        "domio-guest",
        "down",
        "--volumes",
        "--timeout",
        "5",
    )
    label = {"label": f"com.docker.compose.project={project.name}"}
    for left in engine.containers.list(all=True, filters=label):  # of `run`
        left.remove(force=True)
    assert not engine.volumes.list(filters=label)
    assert not engine.networks.list(filters=label)


LOOK = r"""
import glob, json, os, socket
rows = []
for d in glob.glob('/proc/[0-9]*'):
    try:
        words = open(d + '/cmdline', 'rb').read().split(b'\0')
        f = dict(l.split(':', 1) for l in open(d + '/status') if ':' in l)
    except OSError:
        continue  # a health check that ended
    role = [w.decode() for w in words if w.startswith(b'domicile-')]
    if role:
        rows.append({'role': role[0], 'pid': int(d[6:]), 'ppid': int(f['PPid']), 'uid': int(f['Uid'].split()[0]),
            'caps': int(f['CapEff'], 16) | int(f['CapPrm'], 16), 'seccomp': int(f['Seccomp']), 'nnp': int(f['NoNewPrivs'])})
def tries(what):
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return ''
def connect(name):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect('/run/domicile/default/' + name)
links = [l.split(':')[0].strip() for l in open('/proc/net/dev') if ':' in l]
print(json.dumps({'rows': rows, 'links': links,
    'root': tries(lambda: open('/x', 'w')), 'sockets': tries(lambda: open('/run/domicile/x', 'w')),
    'mem': tries(lambda: open('/proc/1/mem', 'rb')),
    'kill': tries(lambda: os.kill(1, 9)),
    'reach': {n: tries(lambda: connect(n)) for n in ('control', 'warden', 'agents/hypervisor', 'agents/domio', 'agents/nvme', 'agents/netio')}}))
"""


def test_each_container_is_confined(composed: Composed) -> None:
    """As the file says, by what the engine and the kernel say: own uid, no capability, default seccomp, read-only root, no network; a
    domain's process can neither end its agent nor reach what belongs to others."""
    composed.up(*MACHINE)
    uids = {}
    for service in MACHINE:
        container = composed.container(service)
        host = container.attrs["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["NetworkMode"] == "none"
        assert list(container.attrs["NetworkSettings"]["Networks"]) == ["none"]
        assert not host["Privileged"]
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert host["Memory"] > 0
        assert host["PidsLimit"] > 0
        assert host["RestartPolicy"]["Name"] == "on-failure"
        assert host["SecurityOpt"] == ["no-new-privileges:true"], "not the default seccomp profile"
        mounts = [m["Destination"] for m in container.attrs["Mounts"] if m["Type"] == "volume"]
        assert mounts == ["/run/domicile"]
        uids[service] = container.attrs["Config"]["User"]
    assert len(set(uids.values())) == len(MACHINE)
    for service in ("domio", "netio", "hypervisor", "domu-pv"):
        seen = composed.python(service, LOOK)
        roles = {row["role"]: row for row in seen["rows"]}
        role = "domicile-domu" if service == "domu-pv" else f"domicile-{service}"
        assert set(roles) == {"domicile-agent", role}, "others' processes are seen"
        assert roles["domicile-agent"]["pid"] == 1
        assert roles[role]["ppid"] == 1
        for row in seen["rows"]:
            assert (row["caps"], row["seccomp"], row["nnp"]) == (0, 2, 1), row
            assert f"{row['uid']}:{row['uid']}" == uids[service]
        assert seen["links"] == ["lo"]
        assert seen["root"] == "OSError"
        assert seen["sockets"] == "PermissionError"
        assert seen["mem"] == "PermissionError"
        own = f"agents/{service}"
        assert all(said == "PermissionError" for name, said in seen["reach"].items() if name != own), seen[
            "reach"
        ]
    # SIGKILL from within, under the agent's own uid, was sent above: it is there as before.
    assert composed.container("domio").attrs["RestartCount"] == 0
    assert composed.container("domio").attrs["State"]["Running"]


@pytest.mark.long
def test_ones_own_kernel(composed: Composed) -> None:
    """`compose run kernel` brings the machine up, and its exit status is the guest's."""
    options = ["--expect", "grub>", "--send", r"halt\r", "--timeout", "60"]
    done = composed.run("run", "--rm", "kernel", GRUB, *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "GNU GRUB" in done.stdout
    done = composed.run("run", "--rm", "kernel", GRUB, "--until", "no such text", "--timeout", "5", "-q")
    assert done.returncode == 124, done.stdout[-2000:] + done.stderr[-2000:]
    assert "no such text" in done.stdout + done.stderr


@pytest.mark.long
def test_the_story_ends_well_and_its_exit_status_is_the_result(composed: Composed) -> None:
    """`up --exit-code-from story` from nothing to the summary."""
    done = composed.run("up", "--no-color", "--exit-code-from", "story")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert re.search(r"all well: (\d+) of \1 steps", done.stdout)


@pytest.mark.long
def test_the_story_with_domio_as_a_guest_program(composed: Composed) -> None:
    """Its own profile starts a container for it; the one of the native DomIO stays empty."""
    done = composed.run(
        "--profile",
        "domio-guest",
        "up",
        "--no-color",
        "--exit-code-from",
        "story",
        DOMICILE_DOMIO_KIND="guest",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert re.search(r"all well: (\d+) of \1 steps", done.stdout)
    assert re.search(r"number \d+ in domio-guest", done.stdout)
    assert not re.search(r"domio begins", done.stdout)


@pytest.mark.long
def test_the_story_with_a_container_that_ends(composed: Composed) -> None:
    """DomIO's container ends in the story, and the engine's restart policy brings it back."""
    done = composed.run("up", "-d", DOMICILE_CONTAINER_DEATH="yes")
    assert done.returncode == 0, done.stderr
    story = composed.container("story")
    status = story.wait(timeout=300)["StatusCode"]
    text = story.logs().decode()
    assert status == 0, text[-6000:]
    assert re.search(r"ok +DomIO's container ends; the guest goes on", text)
    assert composed.container("domio").attrs["RestartCount"] == 1


def kill_first_process(container: Any) -> None:
    """SIGKILL from outside its pid namespace: the engine takes it for a crash, as it does not take `docker kill`."""
    try:
        os.kill(container.attrs["State"]["Pid"], signal.SIGKILL)
    except (PermissionError, ProcessLookupError) as error:
        pytest.skip(f"the engine's processes are not ours to kill: {error}")


ASK = r"""
import socket, sys, time
from toolstack.client import ControlClient
from toolstack.machine import runtime_directory
question, seq = bytes.fromhex(sys.argv[1]), int(sys.argv[2])
client = ControlClient(runtime_directory('default').control)
_, files = client.request_files('network-port', {'bridge': 'xenbr0', 'mirror': False})
with socket.socket(fileno=files[0]) as port:
    port.settimeout(0.5)
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline, 'no answer'
        try:
            port.send(question)
            if seq < 0:
                break
            frame = port.recv(1 << 16)
        except TimeoutError:
            continue
        # IPv4, ICMP, an echo's answer of that number
        if frame[12:14] == b'\x08\x00' and frame[23] == 1 and frame[34] == 0 and frame[40:42] == seq.to_bytes(2, 'big'):
            break
"""


@pytest.mark.long
def test_the_network_is_cut_and_comes_back(composed: Composed, tmp_path: Path) -> None:
    """NetIO's container is killed and started by hand, killed so that the restart policy brings it back, and paused: an operator's
    packets reach a guest afterwards each time, and the guest has seen nothing of it."""
    composed.up(*MACHINE)
    shutil.copy(build("net"), tmp_path / "net.elf")
    tmp_path.chmod(0o755)
    (tmp_path / "net.elf").chmod(0o644)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOMICILE_KERNELS", str(tmp_path))
        name = f"{composed.name}-guest"
        told = Told(
            composed, tmp_path / "log", "run", "--name", name, "kernel", "net.elf", "--vif", f"mac={MAC}", "--timeout", "300"
        )  # fmt: skip
        told.wait_for("net: up")
        operator = composed.engine.containers.get(name)

        def tell(packet: Any, seq: int = -1) -> None:
            status, said = operator.exec_run([PYTHON, "-P", "-c", ASK, bytes(packet).hex(), str(seq)])
            assert status == 0, said

        def ask(seq: int) -> None:
            tell(echo(seq, 100), seq)

        ask(1)
        netio = composed.container("netio")
        netio.kill()
        netio.wait(timeout=30)
        netio.start()
        ask(2)
        before = composed.healthy("netio").attrs["State"]["StartedAt"]
        kill_first_process(composed.container("netio"))
        ask(3)
        assert composed.container("netio").attrs["State"]["StartedAt"] != before, "not even ended"
        netio.pause()
        select.select([], [], [], 3.0)  # how long it stands is what is tested
        netio.unpause()
        ask(4)
        tell(go_on())
        told.wait_for("net: up again")
        tell(go_on())
        assert told.process.wait(60) == 0, told.log.read_text()[-3000:]
        assert "not ok" not in told.log.read_text()


PLAN = """
[[fault]]
what = "kill"
target = "nvme"
at_ms = 30000
"""


class Told:
    """A command of compose in the background, and what it says."""

    def __init__(self, composed: Composed, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*composed.compose, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=REPO
            )

    def wait_for(self, pattern: str, timeout: float = 200.0) -> None:
        """Until it says that. AssertionError."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            select.select([], [], [], 0.2)


@pytest.mark.long
def test_containers_are_killed_paused_and_started_while_a_guest_writes(
    composed: Composed, tmp_path: Path
) -> None:
    """By the engine (`docker kill` and `start`, `pause`), and by SIGKILL to a container's first process, after which the restart policy
    brings it back. The guest sees no error, and all that was acknowledged is there."""
    composed.up(*MACHINE)
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    tmp_path.chmod(0o755)
    plan.chmod(0o644)
    told = Told(
        composed,
        tmp_path / "log",
        "run",
        "--rm",
        "-v",
        f"{plan}:/plan.toml:ro",
        "chaos",
        "--plan",
        "/plan.toml",
    )
    told.wait_for("checksums noted")
    for service in ("domio", "nvme"):
        container = composed.container(service)
        container.kill()
        container.wait(timeout=30)
        container.start()
        composed.healthy(service)
    domio = composed.container("domio")
    before = domio.attrs["State"]["StartedAt"]
    kill_first_process(domio)
    deadline = time.monotonic() + 60
    while composed.container("domio").attrs["State"]["StartedAt"] == before:
        assert time.monotonic() < deadline, "it was not started again"
        select.select([], [], [], 0.3)
    composed.healthy("domio")
    domio = composed.container("domio")
    domio.pause()
    select.select([], [], [], 3.0)  # how long it stands is what is tested
    domio.unpause()
    assert told.process.wait(240) == 0, told.log.read_text()[-5000:]
    assert re.search(r"all well: (\d+) of \1 steps", told.log.read_text())


@pytest.mark.long
def test_the_fault_plan(composed: Composed) -> None:
    """`compose up chaos`, whose default plan ends containers too."""
    done = composed.run("--profile", "chaos", "up", "-d", "chaos")
    assert done.returncode == 0, done.stderr
    chaos = composed.container("chaos")
    status = chaos.wait(timeout=300)["StatusCode"]
    text = chaos.logs().decode()
    assert status == 0, text[-6000:]
    assert re.search(r"all well: (\d+) of \1 steps", text)


@pytest.mark.long
def test_a_machine_that_lost_its_hypervisor_comes_back(composed: Composed) -> None:
    """The hypervisor's container is killed: the machine is down, its warden ends, and both are started again by the engine."""
    composed.up("warden", "hypervisor", "dom0", "domu-pv")
    kill_first_process(composed.container("hypervisor"))
    deadline = time.monotonic() + 60
    while not composed.container("warden").attrs["RestartCount"]:
        assert time.monotonic() < deadline, composed.container("warden").logs()[-2000:]
        select.select([], [], [], 0.3)
    composed.healthy("warden")
    done = composed.run(
        "run", "--rm", "--no-deps", "kernel", GRUB, "--until", "grub>", "--timeout", "60", "-q"
    )
    assert done.returncode == 0, done.stdout + done.stderr
