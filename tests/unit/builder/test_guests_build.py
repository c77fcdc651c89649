"""The conformance guests: they compile, are cached by content, and are what the builder takes; so are real
kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from bus.addresses import Mfn, Port
from domains.dom0.builder import PvBuildRequest, PvhBuildRequest, build_pv, build_pvh, load_kernel
from guests import build as guests
from tests.unit.builder.elf_maker import Memory
from tests.unit.builder.pv_checker import check
from toolstack.guestfetch import FetchError, fetch


def build_and_check(path: Path, pages: int, ramdisk: bytes = b"") -> None:
    kernel = load_kernel(path.read_bytes())
    memory = Memory(pages)
    request = PvBuildRequest(
        kernel, range(4096, 4096 + pages), Mfn(3), Port(1), Port(2), ramdisk, b"console=hvc0"
    )
    check(request, memory, build_pv(request, memory))


def test_every_guest_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs compile without a warning and are PV kernels of 8 MiB (DomIO of 64); a second build compiles nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = guests.build_all()
    assert {
        "hello",
        "info",
        "events",
        "traps",
        "mmu",
        "grants",
        "memory",
        "sched",
        "time",
        "domio",
        "blkfront",
    } <= set(built)
    for name, path in built.items():
        build_and_check(path, 16384 if name == "domio" else 2048)

    def no_compiler(arguments: list[str]) -> None:
        raise AssertionError(f"compiled again: {arguments}")

    monkeypatch.setattr(guests, "_run", no_compiler)
    assert guests.build_all() == built
    assert guests.build("hello") == built["hello"]


def test_build_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown guest, missing headers and a compiler's complaint give a GuestBuildError."""
    with pytest.raises(guests.GuestBuildError, match="no guest named"):
        guests.build("windows")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(guests.GuestBuildError, match="no-such-flag"):
        guests._run(["cc", "--no-such-flag"])
    monkeypatch.setenv("DOMICILE_XEN_HEADERS", str(tmp_path))
    with pytest.raises(guests.GuestBuildError, match="libxen-dev"):
        guests.build("hello")


@pytest.mark.slow
def test_real_kernels() -> None:
    """GRUB for Xen and Debian's Linux, as packaged, build as PV and as PVH guests."""
    try:
        grub, debian = fetch("grub"), fetch("debian")
    except FetchError as error:
        pytest.skip(f"packages cannot be fetched here: {error}")
    build_and_check(grub.kernel, 64 << 8)
    assert debian.ramdisk is not None
    build_and_check(debian.kernel, 192 << 8, debian.ramdisk.read_bytes())
    for path in (grub.pvh_kernel, debian.pvh_kernel):
        assert path is not None
        build_pvh(PvhBuildRequest(load_kernel(path.read_bytes()), 192 << 8), Memory(192 << 8))
