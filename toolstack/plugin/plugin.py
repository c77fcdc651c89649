"""The plugin itself: options, markers, fixtures, and what is kept of a test that failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from toolstack.faults import Faults
    from toolstack.plugin.guests import Console, Domain, GuestMachine
    from toolstack.plugin.network import Network

MARKERS = (
    "domicile_scope(scope): 'function' (a machine for each test) or 'session' (one for all tests of this process)",
    "domicile_machine(memory_mb=..., cpus=...): settings of the test's own machine",
    "pv: the test boots a paravirtual guest",
    "pvh: the test boots a PVH guest",
    "hvm: the test boots an HVM guest",
)
_REPORTS = pytest.StashKey[dict[str, bool]]()
DomainFactory = Callable[..., "Domain"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--domicile-artifacts, and two settings for pytest.ini or pyproject.toml."""
    group = parser.getgroup("domicile", "Xen guests on machines of processes")
    group.addoption(
        "--domicile-artifacts", metavar="DIR", default=None,
        help="where consoles and logs of failed tests are kept (default: the test's tmp_path)",
    )  # fmt: skip
    parser.addini(
        "domicile_scope",
        "function (default): a machine for each test; session: one for all",
        default="function",
    )
    parser.addini("domicile_memory_mb", "memory of a machine in MiB", default="4096")


def pytest_configure(config: pytest.Config) -> None:
    """Names the markers."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Fixtures look there for how the test went."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]  # pluggy's result, which the hook's type does not name
    item.stash.setdefault(_REPORTS, {})[report.when] = report.failed


def _failed(item: pytest.Item) -> bool:
    return any(item.stash.get(_REPORTS, {}).values())


def _scope(request: pytest.FixtureRequest) -> str:
    marker = request.node.get_closest_marker("domicile_scope")
    scope = marker.args[0] if marker and marker.args else request.config.getini("domicile_scope")
    if scope not in ("function", "session"):
        raise pytest.UsageError(f"domicile_scope {scope!r}: use 'function' or 'session'")
    return str(scope)


class _Shared:
    """The machine of this pytest process (of this xdist worker), started when a test first asks for it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._machine: GuestMachine | None = None

    def get(self) -> GuestMachine:
        """Starts it where it does not run (any more)."""
        from toolstack.errors import MachineError
        from toolstack.plugin.guests import GuestMachine

        if self._machine is not None:
            try:
                self._machine.request("uptime")
            except MachineError:
                self.close()
        if self._machine is None:
            self._machine = GuestMachine(**self._settings)
        return self._machine

    def close(self) -> None:
        """Take it down."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None


def _settings(config: pytest.Config) -> dict[str, Any]:
    text = config.getini("domicile_memory_mb")
    if not str(text).isdigit():
        raise pytest.UsageError(f"domicile_memory_mb {text!r}: a number of MiB")
    return {"memory_mb": int(text)}


@pytest.fixture(scope="session")
def _domicile_shared(request: pytest.FixtureRequest) -> Iterator[_Shared]:
    shared = _Shared(_settings(request.config))
    yield shared
    shared.close()


@pytest.fixture
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GuestMachine]:
    """A machine of processes: the test's own, or (setting or marker `domicile_scope`) shared by the session's tests.

    A test's guests end with it either way. If it fails, consoles and logs are kept: see --domicile-artifacts.
    """
    from toolstack.errors import MachineError
    from toolstack.plugin.guests import GuestMachine

    faulty = "faults" in request.fixturenames
    own = faulty or _scope(request) == "function"
    if own:
        marker = request.node.get_closest_marker("domicile_machine")
        settings = _settings(request.config) | (marker.kwargs if marker else {})
        running = GuestMachine(faulty=faulty, **settings)
    else:
        running = request.getfixturevalue("_domicile_shared").get()
    try:
        yield running
    finally:
        try:
            if _failed(request.node):
                keep = request.config.getoption("--domicile-artifacts")
                directory = Path(keep) / _file_name(request.node.nodeid) if keep else tmp_path / "domicile"
                _keep(running, directory, request.node)
            if not own:
                for domain in list(running.domains.values()):
                    domain.destroy()
        except MachineError:
            if not own:  # a shared machine that does not obey is not handed on
                request.getfixturevalue("_domicile_shared").close()
        finally:
            running.domains.clear()
            running.close_networks()
            if own:
                running.close()


def _file_name(nodeid: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", nodeid).strip("-.")[-120:]


def _keep(running: GuestMachine, directory: Path, item: pytest.Item) -> None:
    """Console of each guest, the screen of each full HVM guest that still runs, details of crashes, the hypervisor's log, the
    processes' logs, what ports of bridges saw."""
    from toolstack.errors import MachineError

    directory.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    try:
        running.drain()
        texts["dmesg.txt"] = running.dmesg()
    except MachineError as error:
        texts["machine.txt"] = f"{error}\n{running.machine.errors()}\n"
    for name, domain in running.domains.items():
        texts[f"console-{name}.txt"] = domain.console.text
        if domain.details:
            texts[f"details-{name}.txt"] = domain.details
    texts |= {f"log-{name}": text for name, text in running.logs().items() if text}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8", errors="replace")
    screens = {}
    for name, domain in running.domains.items():
        if domain.type == "hvm" and domain.ended is None:
            with suppress(MachineError):  # it ends just now, or the machine is gone
                screens[f"screen-{name}.png"] = domain.screenshot()
    for name, png in screens.items():
        (directory / name).write_bytes(png)
    captures = {f"network-{number}-{one.bridge}.pcap": one for number, one in enumerate(running.networks)}
    for name, network in captures.items():
        network.save(directory / name)
    item.add_report_section(
        "teardown", "domicile", f"kept in {directory}: {', '.join(sorted([*texts, *screens, *captures]))}"
    )


@pytest.fixture
def domain(machine: GuestMachine) -> DomainFactory:
    """`domain(kernel, ramdisk=, cmdline=, memory_mb=, vcpus=, disks=, vifs=, type=, name=)` builds and starts a guest: a `Domain`."""
    return machine.start


@pytest.fixture
def console(machine: GuestMachine) -> Callable[[str], Console]:
    """`console(name)`: the console of a guest that the test started; every `Domain` has its own as `.console`."""

    def find(name: str) -> Console:
        if name not in machine.domains:
            raise LookupError(f"no guest {name!r}: there are {', '.join(machine.domains) or 'none'}")
        return machine.domains[name].console

    return find


@pytest.fixture
def faults(machine: GuestMachine) -> Faults:
    """The machine's fault plan: `faults.add("kill", target="domio", event="xenbus:back:4")`, then `faults.wait(fault, machine.poll)`.

    A machine with a plan is the test's own, also where machines are shared otherwise. docs/faults.md has events and faults."""
    assert machine.faults is not None
    return machine.faults


@pytest.fixture
def network(machine: GuestMachine) -> Network:
    """The test's port of the bridge xenbr0: `send(packet)`, `expect(filter, timeout)`, `ask(packet, filter)`, `link(loss=0.1, seed=1)`,
    `capture`, `on("xenbr1")` for another one. Guests join by `domain(kernel, vifs=["bridge=xenbr0"])`. If the test fails, what the port
    saw is kept as a pcap file."""
    return machine.network()


@pytest.fixture
def disk(tmp_path: Path) -> Callable[..., Path]:
    """`disk(size_mb, files={path: bytes})`: a raw image in the test's tmp_path; with `files`, an ext4 file system that has them."""
    serial = iter(range(1, 1000))

    def make(size_mb: int = 32, files: dict[str, bytes] | None = None) -> Path:
        from toolstack.plugin.disks import make_disk

        return make_disk(tmp_path / f"disk{next(serial)}.img", size_mb, files)

    return make
