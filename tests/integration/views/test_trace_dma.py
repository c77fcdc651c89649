"""`domicile trace --dma` on a real machine: GRUB reads a file of its disk, and each step of its requests is told as it was."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.machines import RunningMachine, running_machine
from tests.support.trace_format import problems
from toolstack.guestfetch import fetch

pytestmark = pytest.mark.timeout(120)
XVDA = 51712
SECTOR = 77776


def domicile(machine: RunningMachine, *words: str) -> str:
    """The command against that machine; its output."""
    command = [sys.executable, "-m", "toolstack.cli", "-M", machine.machine.runtime.root.name, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def tracing(machine: RunningMachine, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`domicile trace` beside the test, watching already when the block begins."""
    command = [
        sys.executable,
        "-m",
        "toolstack.cli",
        "-M",
        machine.machine.runtime.root.name,
        "trace",
        *words,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        machine.watched()
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[str]) -> str:
    """Its output, when it ended by itself."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    return out


@pytest.fixture
def grub(tmp_path: Path) -> Iterator[RunningMachine]:
    """GRUB with a disk, in the middle of which something is that GRUB has not read at its start."""
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(512 * SECTOR)
        file.write(b"here" * 128)
    config = tmp_path / "g.cfg"
    config.write_text(f'name="g"\nkernel="{fetch("grub").kernel}"\nmemory=64\ndisk=["{disk},raw,xvda,w"]\n')
    with running_machine() as machine:
        domicile(machine, "create", str(config))
        machine.client.request("console", {"domain": "g"})
        machine.expect("g", "grub> ", 60.0)
        yield machine


def test_each_request_has_its_three_steps(grub: RunningMachine) -> None:
    """A read of GRUB's: the grant is mapped for the device, that address is in the PRP, the device asks for it, and the IOMMU gives
    a machine address that the hypervisor's own tables have for it."""
    with tracing(grub, "--dma", "-d", "g", "-n", "1", "--json") as process:
        grub.type("g", f"hexdump (xen/xvda){SECTOR}+8 -s 0 -n 512\n")
        line = finished(process)
    request = json.loads(line.splitlines()[0])
    assert (request["name"], request["disk"], request["operation"], request["status"]) == (
        "g", "xvda", "READ", "OKAY",
    )  # fmt: skip
    assert SECTOR - 64 <= request["sector"] <= SECTOR  # GRUB reads ahead, and the 64 sectors around
    total = 512 * request["sectors"]
    assert sum(segment["length"] for segment in request["segments"]) == total > 0
    pseudophysical = [prp["address"] for command in request["commands"] for prp in command["prps"]]
    assert pseudophysical == [segment["iova"] for segment in request["segments"]]
    data = [dma for dma in request["dma"] if dma["purpose"] == "data"]
    assert {dma["direction"] for dma in data} == {"to memory"}
    assert sum(dma["length"] for dma in data) == total
    pieces = [piece for dma in data for piece in dma["machine"]]
    assert {piece["owner"] for piece in pieces} == {request["domain"]}
    assert all(dma["fault"] is None for dma in data)
    # Frames of the granter's own extent, as the hypervisor's records have it: one for each page that the device named.
    guest = grub.check()["domains"][str(request["domain"])]
    assert guest["extent"] < guest["extent_end"]
    assert all(guest["extent"] <= piece["address"] >> 12 < guest["extent_end"] for piece in pieces)
    assert all(piece["address"] & 0xFFF == piece["iova"] & 0xFFF for piece in pieces)
    frames = {piece["iova"] >> 12: piece["address"] >> 12 for piece in pieces}
    assert len(set(frames.values())) == len(frames) == len({iova >> 12 for iova in pseudophysical})
    assert (
        request["slot_time_ns"]
        < request["commands"][0]["time_ns"]
        < data[0]["time_ns"]
        < request["answered_ns"]
    )


def test_a_timeline_has_flows_from_the_guest_to_the_iommu_and_back(
    grub: RunningMachine, tmp_path: Path
) -> None:
    """`trace --output`: the file holds to the format, and GRUB's reads go through all processes that take part."""
    target = tmp_path / "t.json"
    with tracing(grub, "-o", str(target)) as process:
        grub.type("g", f"hexdump (xen/xvda){SECTOR}+8 -s 0 -n 512\n")
        grub.expect("g", "68 65 72 65")
        grub.expect("g", "grub> ")
        process.send_signal(signal.SIGINT)
        said = finished(process)
    assert re.fullmatch(rf"{target}: \d+ events; open it at ui\.perfetto\.dev\n", said)
    trace = json.loads(target.read_text())
    assert problems(trace) == []
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    flows: dict[int, list[str]] = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(
                processes[event["pid"]].split(" ")[0] + "/" + threads[event["pid"], event["tid"]]
            )
    ring = "d2/xvda of d1 g ring 0"
    whole = ["d1/vCPU 0", ring, ring, "NVMe/queue 1", "hypervisor/IOMMU", ring, "d1/vCPU 0"]
    assert whole in flows.values(), list(flows.values())[:3]
    used = {threads[e["pid"], e["tid"]] for e in events if e["ph"] == "X"}
    assert {"hypercalls", "grants", "event channels", "medium 1", "program"} <= used


def test_run_writes_a_timeline_of_a_guest_from_its_start(tmp_path: Path) -> None:
    """`run --trace FILE`: hypercalls of the guest by name, inside what its vCPU ran."""
    target = tmp_path / "t.json"
    words = [str(fetch("grub").kernel), "--until", "grub>", "--timeout", "60", "-q", "--trace", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "toolstack.cli", "run", *words],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"trace: {target}: " in done.stderr
    trace = json.loads(target.read_text())
    assert problems(trace) == []
    names = {e["name"] for e in trace["traceEvents"] if e["ph"] == "X"}
    assert {"run", "EVTCHNOP_send"} <= names, names
