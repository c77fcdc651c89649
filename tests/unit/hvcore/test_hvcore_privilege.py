"""What only a control domain may ask for, command by command; devices answer to their owner alone."""

from __future__ import annotations

import random
from errno import EINVAL, EPERM

import pytest

from bus.abi import domctl
from bus.abi.hypercalls import HYPERCALLS
from bus.abi.hypercalls_model import Command
from bus.abi.xen import HYPERVISOR_domctl, HYPERVISOR_platform_op, HYPERVISOR_sysctl
from tests.unit.hvcore.hvcore_machine import Machine
from tests.unit.hvcore.test_hvcore_hostile import COMMANDS, VERSIONS, shape

CONTROL = (HYPERVISOR_domctl, HYPERVISOR_sysctl, HYPERVISOR_platform_op)
CONTROL_COMMANDS = [(nr, command) for nr, command in COMMANDS if nr in CONTROL]


@pytest.mark.parametrize(
    ("nr", "command"), CONTROL_COMMANDS, ids=[f"{HYPERCALLS[nr].name}-{c.name}" for nr, c in CONTROL_COMMANDS]
)
def test_each_control_command_is_refused_to_others(nr: int, command: Command) -> None:
    """From a PV and an HVM domain, on itself, on another and on Dom0, with contents of the right form: -EPERM, and nothing changes."""
    machine = Machine()
    pv, hvm = machine.create(), machine.create(flags=domctl.XEN_DOMCTL_CDF_hvm)
    random_ = random.Random(command.number)
    for caller in (pv, hvm):
        for domids in ([caller], [pv + hvm - caller], [0]):
            refused = set()
            for _ in range(30):  # now and then the shape is not right
                data = bytearray(shape(nr, command, random_, domids))
                data[0:8] = command.number.to_bytes(4, "little") + VERSIONS[nr].to_bytes(4, "little")
                before = len(machine.effects)
                token = machine.raw(caller, nr, command.number, bytes(data))
                refused.add(machine.replies[token].rc)
                assert len(machine.effects) == before + 1, machine.effects[before:]
            assert -EPERM in refused
            assert refused <= {-EPERM, -EINVAL}
