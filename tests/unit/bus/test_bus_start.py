"""What a process's start must not do: load code once its privileges are gone, look for garbage, compile annotations."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import time
from typing import ForwardRef

import pytest

import bus.abi
from toolstack.warden.ended import ended_within

BUILD_ALL = """
import sys
import bus.process
from bus.messages import control, device, domain, envelope, model, net, warden
envelope.ready(warden.TO_PROCESS)  # as `begin` does
before = set(sys.modules)

def all_of(base):
    for kind in base.__subclasses__():
        yield kind
        yield from all_of(kind)

kinds = list(all_of(envelope.Message))
for kind in kinds:
    kind.model_rebuild()
    kind.__pydantic_serializer__
message = warden.Begin(role="domu", name="x", domain=1, fds=["a"], settings={"a": [1]})
assert envelope.decode(envelope.encode(message), warden.TO_PROCESS) == message
try:
    envelope.decode(envelope.encode(domain.Hello(pid=1, role="x"))[:-1] + b"\\xc0", domain.FROM_DOMAIN)
except envelope.BadMessage:
    pass
print(len(kinds), sorted(set(sys.modules) - before))
"""


def test_building_a_kind_of_message_loads_no_code() -> None:
    """Kinds are built when first used, which is after a process gave up the uid that can read its code."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD_ALL], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    count, _, loaded = done.stdout.partition(" ")
    assert int(count) > 50
    assert loaded.strip() == "[]"


@pytest.mark.parametrize(("argument", "enabled"), [("domicile-domu", False), ("other", True)])
def test_garbage_is_not_looked_for_while_a_process_loads_its_code(argument: str, enabled: bool) -> None:
    code = (
        "import bus.loading, gc; print(gc.isenabled()); bus.loading.loaded(); "
        "print(gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, argument], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(enabled), "True", "True"]


def test_no_structure_of_the_abi_has_annotations_to_compile() -> None:
    """typing.NamedTuple compiles each annotation that is a string: 1,500 of them are a tenth of a process's start."""
    found = []
    for info in pkgutil.walk_packages(bus.abi.__path__, "bus.abi."):
        for name, record in vars(importlib.import_module(info.name)).items():
            if isinstance(record, type) and issubclass(record, tuple) and hasattr(record, "_fields"):
                kinds = record.__annotations__.values()
                found += [f"{info.name}.{name}" for kind in kinds if isinstance(kind, ForwardRef)]
    assert not found


def test_the_end_of_a_child_is_seen_at_once_and_waited_for_with_a_bound() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        assert not ended_within(child, 0.01)
        child.kill()
        assert ended_within(child, 20.0)
        assert child.returncode == -9
        began = time.monotonic()
        assert ended_within(child, 20.0)
        assert time.monotonic() - began < 10
    finally:
        child.kill()
        child.wait()
