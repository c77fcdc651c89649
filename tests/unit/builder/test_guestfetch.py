"""Fetching guests: the cpio writer, module order, and the cache, with stand-ins for apt and dpkg (no
network)."""

from __future__ import annotations

import gzip
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from toolstack.guestfetch import FetchError, debian, fetch, images, root_disk
from toolstack.guestfetch.cpio import CpioError, CpioWriter
from toolstack.guestfetch.debs import unpacked
from toolstack.guestfetch.modules import ModuleError, ModuleTree, dependencies


def read_cpio(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """{name: (mode, content, device)}, by the format's description."""
    out: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    offset = 0
    while True:
        assert data[offset : offset + 6] == b"070701"
        n = [int(data[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
        name = data[offset + 110 : offset + 110 + n[11] - 1].decode()
        assert data[offset + 110 + n[11] - 1] == 0
        start = offset + 110 + n[11] + 3 & ~3
        if name == "TRAILER!!!":
            return out
        out[name] = (n[1], data[start : start + n[6]], (n[9], n[10]))
        offset = start + n[6] + 3 & ~3


def test_cpio_holds_what_was_put_in() -> None:
    """Files of any length, directories (missing parents too), links and devices come back; the size is
    padded."""
    writer = CpioWriter()
    for size in range(6):
        writer.file(f"a/b/f{size}", b"x" * size, 0o600)
    writer.symlink("link", "a/b")
    writer.device("dev/console", stat.S_IFCHR | 0o600, 5, 1)
    data = writer.finish()
    found = read_cpio(data)
    assert len(data) % 512 == 0
    assert found["a"][0] == found["a/b"][0] == stat.S_IFDIR | 0o755
    assert [found[f"a/b/f{size}"][1] for size in range(6)] == [b"x" * size for size in range(6)]
    assert found["link"][:2] == (stat.S_IFLNK | 0o777, b"a/b")
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    names = list(found)
    assert names.index("a") < names.index("a/b") < names.index("a/b/f0")


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/./b", "TRAILER!!!", "a\0b", "x" * 5000])
def test_cpio_refuses_odd_names(name: str) -> None:
    """Names that would leave the root or confuse a reader are refused."""
    with pytest.raises(CpioError):
        CpioWriter().file(name, b"")


def test_cpio_refuses_a_name_twice() -> None:
    """Two entries of one name are a mistake."""
    writer = CpioWriter()
    writer.file("a", b"")
    with pytest.raises(CpioError, match="twice"):
        writer.directory("a")


def module(*needs: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0"


def test_modules_come_behind_what_they_need(tmp_path: Path) -> None:
    """Dependencies first, each once, built-in ones left out; a cycle does not hang; an unknown one is an
    error."""
    for name, needs in {
        "ext4": ("jbd2", "mbcache"),
        "jbd2": (),
        "mbcache": (),
        "nvme": ("nvme-core", "crc_t10dif"),
        "nvme-core": (),
        "loop-a": ("loop_b",),
        "loop-b": ("loop_a",),
        "bad": ("nowhere",),
    }.items():
        (tmp_path / f"{name}.ko").write_bytes(module(*needs))
    (tmp_path / "modules.builtin").write_text("kernel/lib/crc-t10dif.ko\n")
    tree = ModuleTree(tmp_path)
    order = [name for name, _ in tree.load_order(("ext4", "nvme", "jbd2"))]
    assert order == ["jbd2", "mbcache", "ext4", "nvme_core", "nvme"]
    assert len(tree.load_order(("loop-a",))) == 2
    assert dependencies(module()) == ()
    with pytest.raises(ModuleError, match="nowhere"):
        tree.load_order(("bad",))


def test_initramfs_has_init_and_modules_in_order() -> None:
    """The init is executable and says its line; modules are listed in the order given; bytes are
    reproducible."""
    content = images.initramfs(b"BUSYBOX", [("b", b"B"), ("a", b"A")], {"etc/rc.guest": b"echo hi\n"})
    found = read_cpio(gzip.decompress(content))
    assert found["init"][0] == stat.S_IFREG | 0o755
    assert images.INIT_LINE.encode() in found["init"][1]
    assert found["bin/busybox"][1] == b"BUSYBOX"
    assert found["lib/modules/order"][1] == b"b\na\n"
    assert found["lib/modules/a.ko"][1] == b"A"
    assert content == images.initramfs(b"BUSYBOX", [("b", b"B"), ("a", b"A")], {"etc/rc.guest": b"echo hi\n"})


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and an apt-get, apt-cache and dpkg-deb that make packages from nothing and log
    their calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "tools"
    place.mkdir()
    log = tmp_path / "log"
    scripts = {
        "apt-get": 'echo "$@" >> LOG\n[ "$3" = broken ] && { echo "E: Unable to fetch" >&2; exit 100; }\ntouch "$3.deb"',
        "apt-cache": "echo linux-image-amd64\necho '  Depends: linux-image-9.9-amd64'",
        "dpkg-deb": (
            'mkdir -p "$3/bin" "$3/boot" "$3/usr/share/seabios" "$3/lib/modules/9.9"\n'
            'echo tool > "$3/bin/busybox"; echo kernel > "$3/boot/vmlinuz-9.9-amd64"\n'
            'echo bios > "$3/usr/share/seabios/bios-256k.bin"'
        ),
    }
    for name, text in scripts.items():
        (place / name).write_text(f"#!/bin/sh\n{text.replace('LOG', str(log))}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    log.touch()
    return log


def test_fetch_is_done_once(tools: Path) -> None:
    """The second call takes nothing but the cache, and gives the same paths; nothing half-done is left beside
    them."""
    first = fetch("debian")
    assert first.kernel.read_text() == "kernel\n"
    assert first.ramdisk is not None
    assert read_cpio(gzip.decompress(first.ramdisk.read_bytes()))["bin/busybox"][1] == b"tool\n"
    calls = tools.read_text()
    assert fetch("debian") == first
    assert debian(extra={"etc/rc.guest": b"true"}).ramdisk != first.ramdisk
    assert tools.read_text() == calls
    assert fetch("seabios").kernel.read_text() == "bios\n"
    packages = first.kernel.parent.parent.parent
    assert sorted(p.name for p in packages.iterdir()) == [
        "busybox-static",
        "linux-image-9.9-amd64",
        "seabios",
    ]


def test_errors_name_the_thing(tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An unknown guest, a failed download, a package without the file, and a machine without apt: one line
    each."""
    with pytest.raises(FetchError, match="no guest named 'bsd'"):
        fetch("bsd")
    with pytest.raises(FetchError, match="Unable to fetch"):
        unpacked("broken")
    with pytest.raises(FetchError, match=r"grub-x86_64-xen\.bin"):
        fetch("grub")
    with pytest.raises(FetchError, match="not the name"):
        unpacked("../etc")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="apt-get is not here"):
        unpacked("other")


def test_root_disk(tools: Path, tmp_path: Path) -> None:
    """An ext4 image of the size asked for, whose init is ours and belongs to root; made again it is
    replaced."""
    target = root_disk(tmp_path / "root.img", 8, extra={"etc/motd": b"hello\n"})
    root_disk(target, 16)
    root_disk(target, 8, extra={"etc/motd": b"hello\n"})
    content = target.read_bytes()
    assert len(content) == 8 << 20
    assert content[1080:1082] == b"\x53\xef"
    debugfs = shutil.which("debugfs", path="/sbin:/usr/sbin")
    assert debugfs is not None, "debugfs belongs to e2fsprogs, as mke2fs does"
    shown = subprocess.run([debugfs, "-R", "cat /sbin/init", str(target)], capture_output=True, check=True)
    assert images.INIT_LINE.encode() in shown.stdout
    shown = subprocess.run([debugfs, "-R", "stat /", str(target)], capture_output=True, check=True)
    assert b"User:     0" in shown.stdout
    with pytest.raises(FetchError, match="MiB"):
        root_disk(target, 1)
    with pytest.raises(FetchError, match="leaves the image"):
        root_disk(tmp_path / "bad.img", 8, extra={"../x": b""})
    assert not (tmp_path / "bad.img").exists()
