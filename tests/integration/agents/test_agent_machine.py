"""A machine whose processes are started by wardens of containers (agents), on plain processes: boots, blows, and agents that lie."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.l2 import Ether

from guests.build import build
from tests.integration.network.net_packets import MAC, echo
from tests.support.agents import BOUND_S, CONTAINERS, AgentMachine, agent_machine
from toolstack.cli.images import Images, make_config
from toolstack.demo.guest import GREETING, get_files
from toolstack.domio import use_program
from toolstack.errors import MachineError
from toolstack.guestfetch import fetch
from toolstack.xlcfg.devices import parse_vif

pytestmark = pytest.mark.timeout(180)


def grub(machine: AgentMachine, name: str, up: str = "grub>", **fields: object) -> None:
    """A guest that is at its prompt, or has printed what says that it is up."""
    with Images() as images:
        given = {"name": name, "kernel": str(fetch("grub").kernel), "memory_mb": 64, "on_reboot": "destroy"}
        config = make_config({**given, **fields}, images)
        machine.client.request("create", {"config": config, "attach": True}, images.descriptors)
    machine.expect(name, up)


def blow(machine: AgentMachine, agent: str, what: str) -> None:
    """Strike; another process takes the place of that one."""
    begun = machine.operator.agents()[agent].begun
    if what == "container":
        machine.kill_container(agent)
        machine.start_agent(agent)
    else:
        machine.operator.strike(agent, what)
    machine.wait(
        lambda: machine.operator.agents()[agent].begun > begun, f"{what} {agent}: another takes its place"
    )


def is_prompt(machine: AgentMachine, name: str) -> None:
    """The guest still answers."""
    machine.type(name, "\r")
    machine.expect(name, "grub>")


def test_a_guest_runs_where_its_kind_belongs() -> None:
    """In its container; the hypervisor counts its CPU time without its process id meaning anything to it; each is given back."""
    with agent_machine() as machine:
        grub(machine, "grub")
        agents = machine.operator.agents()
        assert agents["domu-pv"].role == "domu"
        assert not agents["domu-pvh"].role
        row = machine.domains()["grub"]
        assert agents["domu-pv"].domain == row["domid"]
        assert row["time_s"] > 0.01
        machine.check()
        machine.client.request("destroy", {"domain": "grub"})
        machine.wait(lambda: not machine.operator.agents()["domu-pv"].role, "its process is gone")
        grub(machine, "again")
        assert machine.operator.agents()["domu-pv"].begun == 2


def test_a_guest_reads_its_disk_while_driver_domain_and_device_are_killed_stopped_and_taken_away(
    tmp_path: Path,
) -> None:
    """By an operator's order, and by the end of their containers, which come back."""
    with agent_machine() as machine:
        disk = str(get_files(tmp_path).disk)
        grub(machine, "grub", disks=[{"vdev": "xvda", "format": "raw", "readonly": True, "target": disk}])
        name, text = GREETING
        for agent, what in (
            ("", ""),
            ("domio", "kill"),
            ("domio", "stop"),
            ("domio", "container"),
            ("nvme", "container"),
            ("nvme", "kill"),
        ):
            if agent:
                blow(machine, agent, what)
            machine.type("grub", f"cat (xen/xvda)/{name}\r")
            machine.expect("grub", text)
        assert machine.operator.agents()["domio"].enrolled == 2
        machine.check()


def test_domio_as_a_guest_program_has_a_container_of_its_own(tmp_path: Path) -> None:
    """It takes no guest's place, and is replaced as the native one is: by an operator's order, and by the end of its container."""
    with agent_machine() as machine:
        program = os.open(build("domio"), os.O_RDONLY)
        use_program(machine.client, program, "domio")
        os.close(program)
        disk = str(get_files(tmp_path).disk)
        grub(machine, "grub", disks=[{"vdev": "xvda", "format": "raw", "readonly": True, "target": disk}])
        name, text = GREETING
        for what in ("", "kill", "stop", "container"):
            if what:
                blow(machine, "domio-guest", what)
            machine.type("grub", f"cat (xen/xvda)/{name}\r")
            machine.expect("grub", text)
        agents = machine.operator.agents()
        assert agents["domio-guest"].role == "domu"
        assert agents["domio"].begun == 0
        assert agents["domu-pv"].role == "domu"
        machine.check()


def answers(machine: AgentMachine, port: socket.socket, seq: int) -> None:
    """The guest on the bridge answers a ping, which is asked again as on any network."""
    answered = False

    def asked() -> bool:
        nonlocal answered
        with contextlib.suppress(BlockingIOError):
            port.send(bytes(echo(seq, 100)))
            while not answered:
                frame = Ether(port.recv(1 << 16))
                answered = bool(frame.haslayer(ICMP)) and (frame[ICMP].type, frame[ICMP].seq) == (0, seq)
        return answered

    machine.wait(asked, f"answer {seq}")


def test_guests_reach_each_other_and_tests_through_netio_in_its_container() -> None:
    """Whatever becomes of its process, or of the whole container: frontends and ports stay."""
    with agent_machine() as machine:
        grub(machine, "net", "net: up", kernel=str(build("net")), vifs=[parse_vif(f"mac={MAC}", "vif")])
        _, files = machine.client.request_files("network-port", {"bridge": "xenbr0", "mirror": False})
        with socket.socket(fileno=files[0]) as port:
            port.setblocking(False)
            for seq, what in enumerate(("", "kill", "stop", "container")):
                if what:
                    blow(machine, "netio", what)
                answers(machine, port, seq)
        agents = machine.operator.agents()
        assert agents["netio"].role == "netio"
        assert agents["netio"].enrolled == 2
        assert not agents["domio"].role
        machine.check()


LIES = {
    "garbage": "said what is no message",
    "death of others": "is not in this container",
    "own death": "and lives",
    "twice": "enrolled twice",
    "descriptors": "without a pidfd",
}


def test_an_agent_that_lies_harms_its_own_container_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its domain goes; the machine and another guest go on."""
    monkeypatch.setenv("DOMICILE_LIE", "nothing yet")
    with agent_machine(modules={"domu-pvh": "tests.support.liar_agent"}) as machine:
        grub(machine, "honest")
        pvh = str(fetch("grub").pvh_kernel)
        for number, (lie, found) in enumerate(LIES.items()):
            monkeypatch.setenv("DOMICILE_LIE", lie)
            enrolled = machine.operator.agents()["domu-pvh"].enrolled
            machine.kill_container("domu-pvh")
            machine.start_agent("domu-pvh")
            machine.wait(
                lambda enrolled=enrolled: machine.operator.agents()["domu-pvh"].enrolled > enrolled,
                "the liar enrols",
            )
            name = f"victim{number}"
            with Images() as images:
                fields = {"name": name, "type": "pvh", "kernel": pvh, "memory_mb": 64}
                request = {"config": make_config(fields, images), "attach": True}
                try:
                    machine.client.request("create", request, images.descriptors)
                except MachineError:
                    pass  # it ended while it was built
                else:
                    machine.wait(lambda name=name: name in machine.ended, f"{lie}: the liar's domain ends")
            assert found in machine.said("warden"), lie
            is_prompt(machine, "honest")
        machine.check()


def test_nobody_takes_an_agents_place() -> None:
    """A second connection is refused while the first lives; so is one of another uid, whatever it could reach."""
    with agent_machine() as machine:
        path = machine.runtime.root / "agents" / "domio"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(path))
            assert select.select([sock], [], [], BOUND_S)[0]
            assert not sock.recv(100)
        machine.wait(lambda: "a second agent while the first lives" in machine.said("warden"), "it is said")
        assert machine.operator.agents()["domio"].enrolled == 1
        with pytest.raises(MachineError, match="no container 'x'"):
            machine.operator.strike("x", "kill")
        if os.getuid() != 0:
            return
        assert as_uid(machine.uids["nvme"], path) == "PermissionError"
        path.chmod(0o666)
        machine.kill_container("domio")
        machine.wait(lambda: not machine.operator.agents()["domio"].connected, "it is gone")
        assert as_uid(machine.uids["nvme"], path) == ""
        machine.wait(
            lambda: f"refused: uid {machine.uids['nvme']}" in machine.said("warden"), "the uid is refused"
        )
        assert not machine.operator.agents()["domio"].connected


def as_uid(uid: int, path: Path) -> str:
    """What a process of that uid finds when it connects there: the exception's name, or what it reads ('': the end)."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(BOUND_S)
                sock.connect(str(path))
                os.write(write, sock.recv(100))
        except OSError as error:
            os.write(write, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, encoding="ascii") as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def test_the_machine_ends_with_its_hypervisor_and_with_its_warden_and_comes_back() -> None:
    """Every process goes; agents stay, and serve the next machine."""
    with agent_machine() as machine:
        grub(machine, "grub")
        machine.kill_container("warden")
        ended = "the link to the machine's warden is over"
        for name in CONTAINERS:
            wait_said(machine, name, ended)
        reconnect(machine)
        grub(machine, "grub")
        machine.kill_container("hypervisor")
        assert machine.processes["warden"].wait(BOUND_S) == 1
        assert "the hypervisor ended with signal 9" in machine.said("warden")
        machine.start_agent("hypervisor")
        reconnect(machine)
        grub(machine, "grub")


def wait_said(machine: AgentMachine, name: str, text: str) -> None:
    """Until it was said. AssertionError."""
    for _ in range(int(BOUND_S / 0.05)):
        if text in machine.said(name):
            return
        select.select([], [], [], 0.05)
    raise AssertionError(f"{name}: {text!r} was not said: {machine.said(name)[-1000:]}")


def reconnect(machine: AgentMachine) -> None:
    """A new warden, a new machine."""
    machine.client.close()
    machine.operator.close()
    machine.start_warden()
    machine.connect()
