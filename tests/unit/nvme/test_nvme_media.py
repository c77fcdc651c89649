"""Media: raw files, qcow2 images made by qemu-img and broken by hand, overlays and what is left of them after a power cut."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.devices.nvme.disks import DiskError, open_disks
from drivers.hw.nvme.media import MediaError, RawMedia
from drivers.hw.nvme.media_overlay import BLOCK, OverlayMedia
from drivers.hw.nvme.media_qcow2 import Qcow2Media, is_qcow2
from tests.unit.nvme.nvme_host import raw_file

SIZE = 4 << 20
needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img makes the images")


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR)


def read(media: RawMedia | Qcow2Media | OverlayMedia, offset: int, length: int) -> bytes:
    data = bytearray(b"\xee" * length)
    media.read(offset, memoryview(data))
    return bytes(data)


@pytest.fixture
def pattern(tmp_path: Path) -> tuple[Path, bytes]:
    """A raw file with data, compressible parts and holes."""
    made = random.Random(1)
    data = bytearray(SIZE)
    for start in range(0, SIZE, 1 << 18):
        data[start : start + 70000] = (
            made.randbytes(70000) if start >> 18 & 1 else b"compressible " * 5000 + bytes(5000)
        )
    path = tmp_path / "raw"
    path.write_bytes(data)
    return path, bytes(data)


@needs_qemu_img
@pytest.mark.parametrize(
    "options",
    [
        ["-o", "compat=0.10"],
        ["-o", "compat=1.1"],
        ["-c"],
        ["-c", "-o", "compression_type=zstd"],
        ["-o", "cluster_size=4096"],
        ["-o", "cluster_size=2M"],
        ["-c", "-o", "cluster_size=512"],
    ],
)
def test_qcow2_reads_as_qemu_img_wrote_it(
    pattern: tuple[Path, bytes], options: list[str], tmp_path: Path
) -> None:
    """Versions 2 and 3, both compressions, the range of cluster sizes: all bytes, at any offset."""
    path, data = pattern
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", *options, path, image], check=True, timeout=60)
    media = Qcow2Media(opened(image))
    assert media.size == SIZE
    assert read(media, 0, SIZE) == data
    made = random.Random(2)
    for _ in range(50):
        offset = made.randrange(SIZE // 512) * 512
        length = min(SIZE - offset, made.randrange(1, 400) * 512)
        assert read(media, offset, length) == data[offset : offset + length]
    with pytest.raises(MediaError):
        media.write(0, memoryview(bytes(512)), False)
    media.close()


@needs_qemu_img
def test_qcow2_backing(pattern: tuple[Path, bytes], tmp_path: Path) -> None:
    """A backing file is read through the descriptor that was given, and is missed when none was."""
    path, data = pattern
    image = tmp_path / "image"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", path, image, "6M"], check=True
    )
    with pytest.raises(MediaError, match="backing"):
        Qcow2Media(opened(image))
    media = Qcow2Media(opened(image), RawMedia(opened(path), read_only=True))
    assert read(media, 0, 6 << 20) == data + bytes(2 << 20)
    media.close()


@needs_qemu_img
@settings(max_examples=150, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 0x50010), st.integers(0, 255)), min_size=1, max_size=6))
def test_broken_qcow2_is_an_error_and_nothing_worse(
    places: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any bytes of header, L1, L2 and compressed data changed: MediaError or bytes, no other exception."""
    global _image
    if _image is None:
        directory = tmp_path_factory.mktemp("qcow2")
        (directory / "raw").write_bytes(b"compressible " * 20000)
        os.truncate(directory / "raw", 1 << 20)
        subprocess.run(
            ["qemu-img", "convert", "-c", "-O", "qcow2", directory / "raw", directory / "image"], check=True
        )
        _image = (directory / "image").read_bytes()
    broken = bytearray(_image)
    for place, value in places:
        broken[place % len(broken)] = value
    fd = os.memfd_create("broken")
    os.pwrite(fd, broken, 0)
    try:
        media = Qcow2Media(fd)
        for offset in range(0, min(media.size, 1 << 20), 65536):
            read(media, offset, min(65536, media.size - offset))
    except MediaError:
        pass
    os.close(fd)


_image: bytes | None = None


@pytest.mark.parametrize(
    ("offset", "code", "value", "says"),
    [
        (32, ">I", 1, "encrypted"),
        (72, ">Q", 4, "external"),
        (72, ">Q", 16, "extended"),
        (72, ">Q", 2, "corrupt"),
        (72, ">Q", 1 << 40, "unknown"),
        (20, ">I", 30, "clusters"),
        (24, ">Q", 1 << 60, "size"),
        (36, ">I", 0, "L1"),
        (40, ">Q", 1 << 40, "outside"),
        (4, ">I", 9, "version"),
    ],
)
def test_qcow2_headers_refused(offset: int, code: str, value: int, says: str) -> None:
    """What is not supported is said by its name."""
    header = bytearray(65536 * 3)
    struct.pack_into(">4sIQIIQIIQQIIQ", header, 0, b"QFI\xfb", 3, 0, 0, 16, SIZE, 0, 1, 65536, 0, 0, 0, 0)
    struct.pack_into(">I", header, 100, 104)
    fd = os.memfd_create("header")
    os.pwrite(fd, header, 0)
    Qcow2Media(os.dup(fd)).close()
    struct.pack_into(code, header, offset, value)
    os.pwrite(fd, header, 0)
    with pytest.raises(MediaError, match=says):
        Qcow2Media(fd)
    assert is_qcow2(fd)
    os.close(fd)


def overlay(base: RawMedia, boot: bytes = b"a" * 36) -> tuple[OverlayMedia, int, int]:
    data, bitmap = os.memfd_create("data"), os.memfd_create("bitmap")
    return OverlayMedia(base, os.dup(data), os.dup(bitmap), boot=boot), data, bitmap


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["write", "zero", "discard", "flush"]), st.integers(0, 255), st.integers(1, 40)
        ),
        max_size=25,
    )
)
def test_overlay_is_the_base_with_what_was_written(steps: list[tuple[str, int, int]]) -> None:
    """Against a model, sector by sector; the base is not touched; a new process on the same host sees all of it."""
    base = raw_file(1 << 17)
    base.write(0, memoryview(b"\x11" * (1 << 17)), False)
    media, data, bitmap = overlay(base)
    model = bytearray(b"\x11" * (1 << 17))
    for n, (what, sector, count) in enumerate(steps):
        offset, length = sector * 512, min(count * 512, (1 << 17) - sector * 512)
        if what == "write":
            model[offset : offset + length] = bytes([n + 32]) * length
            media.write(offset, memoryview(bytes([n + 32]) * length), False)
        elif what == "flush":
            media.flush()
        else:
            model[offset : offset + length] = bytes(length)
            if what == "zero":
                media.zero(offset, length, bool(n & 1), False)
            else:
                media.discard(offset, length)
        assert read(media, 0, 1 << 17) == model
    assert read(base, 0, 1 << 17) == b"\x11" * (1 << 17)
    again = OverlayMedia(base, data, bitmap, boot=b"a" * 36)
    assert read(again, 0, 1 << 17) == model
    for one in (media, again):
        one._now.release()
        one._flushed.release()
    os.close(data)
    os.close(bitmap)


def test_overlay_after_a_power_cut() -> None:
    """Another boot, the unflushed data lost: blocks that were flushed are as flushed, the others are the base's, none is garbage."""
    base = raw_file(1 << 16)
    base.write(0, memoryview(b"\x22" * (1 << 16)), False)
    media, data, bitmap = overlay(base)
    media.write(512, memoryview(b"\x33" * 512), False)
    media.flush()
    media.write(2 * BLOCK, memoryview(b"\x44" * 512), False)
    os.pwrite(data, bytes(BLOCK), 2 * BLOCK)  # its data never reached the disk, but the page with its bit did
    after = OverlayMedia(base, os.dup(data), os.dup(bitmap), boot=b"b" * 36)
    assert read(after, 0, BLOCK) == b"\x22" * 512 + b"\x33" * 512 + b"\x22" * (BLOCK - 1024)
    assert read(after, 2 * BLOCK, BLOCK) == b"\x22" * BLOCK


def test_overlay_of_another_disk_is_refused() -> None:
    """The bitmap says how large its disk is."""
    _media, data, bitmap = overlay(raw_file(1 << 16))
    with pytest.raises(MediaError, match="another"):
        OverlayMedia(raw_file(1 << 17), data, bitmap)


def test_raw_sizes_and_settings() -> None:
    """No multiple of 512, an empty file, a pipe, unknown formats and half an overlay are refused in words."""
    for size in (0, 1000):
        fd = os.memfd_create("odd")
        os.ftruncate(fd, size)
        with pytest.raises(MediaError, match="512"):
            RawMedia(fd)
    end, other = os.pipe()
    with pytest.raises(MediaError, match="neither"):
        RawMedia(end)
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 8192)
    for fds, options, says in (
        ({}, {}, "no namespace"),
        ({"namespace1": fd}, {"namespace1": {"format": "vmdk"}}, "vmdk"),
        ({"namespace1": fd}, {"namespace1": {"block": 1000}}, "1000"),
        ({"namespace1": fd, "namespace1.overlay": fd}, {}, "bitmap"),
        ({"namespace1": fd}, {"namespace1": "x"}, "table"),
    ):
        with pytest.raises(DiskError, match=says):
            open_disks(fds, options)
    media, shifts = open_disks({"namespace1": fd}, {"namespace1": {"block": 4096, "read_only": True}})
    assert media[1].read_only
    assert shifts == {1: 12}
    for one in (end, other, fd):
        os.close(one)
