"""The NVMe controller as a process of its own, behind the real IOMMU, DMA service and device shell."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from drivers.hw.nvme import spec
from drivers.hw.nvme.spec import AdminOpcode, IoOpcode, Status
from tests.integration.devices.device_driver import DATA, Driver
from tests.integration.devices.device_host import BDF, DOMAIN, DeviceHost

SIZE = 8 << 20


@pytest.fixture
def disk() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), SIZE)
        yield file.fileno()


@pytest.mark.parametrize("doorbells", [True, False])
def test_read_and_write(disk: int, doorbells: bool) -> None:
    """With doorbell pages and without: identify, 32 writes at once, 32 reads elsewhere; the file and the memory hold the bytes, the
    interrupt came, and nothing faulted."""
    with DeviceHost({"namespace1": disk}, {"serial": "S1"}, doorbells=doorbells) as host:
        driver = Driver(host)
        driver.set_up()
        assert (host.page is not None) == doorbells
        driver.run(0, [driver.command(AdminOpcode.IDENTIFY, cdw10=1, prp1=DATA)])
        page = spec.IDENTIFY_CONTROLLER.unpack(host.memory, DATA)
        assert page.sn == b"S1".ljust(20)
        assert page.nn == 1
        payload = [bytes([n + 1]) * 16384 for n in range(32)]
        for direction in (IoOpcode.WRITE, IoOpcode.READ):
            commands = []
            for n, data in enumerate(payload):
                at = DATA + 16384 * n
                host.memory[at : at + 16384] = data if direction is IoOpcode.WRITE else bytes(16384)
                commands.append(
                    driver.command(direction, nsid=1, cdw10=32 * n, cdw12=31, **driver.prps(at, 16384, n))
                )
            done = driver.run(1, commands)
            assert [spec.status_of(entry.status) for entry in done] == [0] * 32
            for n, data in enumerate(payload):
                assert os.pread(disk, 16384, 16384 * n) == data
                assert host.memory[DATA + 16384 * n : DATA + 16384 * (n + 1)] == data
        assert 71 in host.interrupts
        assert not host.iommu.faults.total()


def test_killed_and_started_again(disk: int) -> None:
    """SIGKILL with writes under way: a new process of a new epoch serves the same file; what was acknowledged is there."""
    with DeviceHost({"namespace1": disk}, {}) as host:
        for round_ in range(3):
            driver = Driver(host)
            driver.set_up()
            host.memory[DATA : DATA + 4096] = bytes([round_ + 65]) * 4096
            write = driver.command(IoOpcode.WRITE, nsid=1, prp1=DATA, cdw10=8 * round_, cdw12=7)
            assert spec.status_of(driver.run(1, [write])[0].status) == 0
            more = [
                driver.command(IoOpcode.WRITE, nsid=1, prp1=DATA, cdw10=8 * (n + 100), cdw12=7)
                for n in range(30)
            ]
            driver.submit(1, more)
            host.kill()
            host.start()
        for round_ in range(3):
            assert os.pread(disk, 4096, 4096 * round_) == bytes([round_ + 65]) * 4096


def test_new_epoch_is_a_function_level_reset(disk: int) -> None:
    """After a second Attach the registers are as after power on, with other doorbell pages, and the device works again."""
    with DeviceHost({"namespace1": disk}, {}) as host:
        Driver(host).set_up()
        assert host._mapping is not None
        old = host._mapping
        host.iommu.deassign(BDF)
        host.epoch = host.iommu.assign(BDF, DOMAIN)
        host.attach()
        assert host.access(-1, 4, 2) == 0
        assert host._mapping is not old
        driver = Driver(host)
        driver.set_up()
        read = driver.command(IoOpcode.READ, nsid=1, prp1=DATA)
        assert spec.status_of(driver.run(1, [read])[0].status) == 0


def test_iommu_faults_reach_the_driver_as_status(disk: int) -> None:
    """An address that the domain does not own is a data transfer error of that command, and is in the fault log."""
    with DeviceHost({"namespace1": disk}, {}) as host:
        driver = Driver(host)
        driver.set_up()
        commands = [
            driver.command(IoOpcode.READ, nsid=1, prp1=1 << 40),
            driver.command(IoOpcode.READ, nsid=1, prp1=DATA),
        ]
        done = {entry.cid: spec.status_of(entry.status) for entry in driver.run(1, commands)}
        assert [done[command.cid] for command in commands] == [Status.DATA_TRANSFER_ERROR, 0]
        assert host.iommu.faults.total() == 1
