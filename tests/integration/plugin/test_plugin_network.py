"""The plugin's fixture `network` in a project of a stranger's: a failure shows what came, and the capture is kept; bytes do without scapy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from scapy.layers.l2 import ARP
from scapy.utils import rdpcap

from guests.build import build

TEST = """
import sys

import pytest

KERNEL = {kernel!r}


def test_that_fails(domain, network):
    domain(KERNEL, vifs=["mac=00:16:3e:00:00:02"]).console.expect("net: up")
    network.send(bytes.fromhex("ffffffffffff 020000000001 88b5") + b"hello".ljust(46))
    network.expect(lambda one: False, timeout=2)


def test_bytes_without_scapy(domain, network, monkeypatch):
    import toolstack.plugin.network as plugin

    monkeypatch.setattr(plugin, "has_scapy", lambda: False)
    domain(KERNEL, vifs=["mac=00:16:3e:00:00:02", "mac=00:16:3e:00:00:03,bridge=other"])
    frame = network.expect(lambda data: data[12:14] == b"\\x08\\x06", timeout=30)
    assert isinstance(frame, bytes) and frame[6:12].hex(":") == "00:16:3e:00:00:02"
    with pytest.raises(Exception, match="14 to 65535"):
        network.send(b"short")
    with pytest.raises(Exception, match="a layer of scapy"):
        network.expect("arp")
    with pytest.raises(Exception, match="loss"):
        network.link(loss=3)
"""


@pytest.mark.timeout(120)
def test_a_failure_keeps_the_capture_and_says_what_came(tmp_path: Path) -> None:
    (tmp_path / "test_stranger.py").write_text(TEST.format(kernel=str(build("net"))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--domicile-artifacts", str(tmp_path / "kept"), str(tmp_path)],
        capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout[-3000:]
    assert "no frame like" in done.stdout
    assert "ARP who has 10.0.0.2" in done.stdout  # what came instead
    assert "net: up" in done.stdout  # the guest's console
    (pcap,) = (tmp_path / "kept").rglob("network-0-xenbr0.pcap")
    packets = rdpcap(str(pcap))
    assert any(packet.haslayer(ARP) for packet in packets)
    assert any(b"hello" in bytes(packet) for packet in packets)
