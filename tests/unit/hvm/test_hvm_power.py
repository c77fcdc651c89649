"""ACPI's fixed registers beside the vCPU: no exit to a device model, the power button's interrupt, powering off."""

from __future__ import annotations

import pytest

from bus.abi.sched import SHUTDOWN_poweroff
from tests.unit.hvm.hvm_rig import DATA, Rig, mov

pytestmark = pytest.mark.usefixtures("paging")

PM = 0xB000
HLT = "f4"


def test_the_pm_timer_counts_without_a_device_model() -> None:
    """Two reads with some work between them; there is no device model here that could answer."""
    read = f"66ba{(PM + 8).to_bytes(2, 'little').hex()}" + "ed"
    code = read + "89c3" + mov("ecx", 200_000) + "e2fe" + read  # in eax, dx; mov ebx, eax; loop .; in eax, dx
    rig = Rig(code + HLT, board=True)
    rig.run(20)
    passed = (rig.regs.rax - rig.regs.rbx) & 0xFFFFFFFF
    assert 0 < passed < 3_579_545 * 60
    assert rig.domain.model is None


def test_the_power_button_is_the_scis_interrupt() -> None:
    """PM1 enable is written, the button is pressed: the SCI rises, and the status says why."""
    port = PM.to_bytes(2, "little").hex()
    enable = f"66ba{(PM + 2).to_bytes(2, 'little').hex()}" + mov("eax", 0x100) + "66ef"
    status = f"66ba{port}" + "66ed"
    rig = Rig(enable + status + "89c3" + "ebfe", board=True)
    rig.run(1)
    board = rig.domain.board
    assert board is not None
    assert not rig.regs.rbx & 0x100
    levels: list[bool] = []
    board.acpi._sci = levels.append  # type: ignore[misc]
    board.acpi.press_power_button()
    assert levels == [True]
    assert board.acpi.read(0, 2) & 0x100
    board.acpi.write(0, 2, 0x100)
    assert levels == [True, False]


def test_soft_off_powers_the_domain_off() -> None:
    """PM1 control: SLP_EN with SLP_TYP 0."""
    port = (PM + 4).to_bytes(2, "little").hex()
    rig = Rig(f"66ba{port}" + mov("eax", 0x2001) + "66ef" + HLT, board=True)
    rig.run(5)
    assert rig.domain.life.shutdown_code == SHUTDOWN_poweroff
    assert rig.word(DATA) == 0
