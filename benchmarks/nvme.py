"""Benchmark of the NVMe process behind the hypervisor's IOMMU and DMA service: `python benchmarks/nvme.py [--profile]`.

The driver, the hypervisor's part (peer, IOMMU, copies) and the measurement run in this process; the device in its own. Figures: 4 KiB
random reads and writes a second at queue depth 32 (page cache warm), and MB/s of 128 KiB sequential transfers at depth 16.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from drivers.hw.nvme.spec import Command, IoOpcode
from tests.integration.devices.device_driver import DATA, Driver
from tests.integration.devices.device_host import DeviceHost

DISK = 64 << 20


def measure(
    driver: Driver, opcode: IoOpcode, size: int, depth: int, seconds: float, sequential: bool
) -> float:
    """Commands a second."""
    driver_prps = [driver.prps(DATA + size * n, size, n) for n in range(depth)]
    blocks = DISK // size
    free = list(range(depth))
    slots: dict[int, int] = {}
    done = at = 0

    def fresh() -> list[Command]:
        nonlocal at
        commands = []
        while free:
            slot = free.pop()
            at = (at + 1) % blocks if sequential else random.randrange(blocks)
            lba = at * size // 512
            command = driver.command(opcode, nsid=1, cdw10=lba, cdw12=size // 512 - 1, **driver_prps[slot])
            slots[command.cid] = slot
            commands.append(command)
        return commands

    start = time.perf_counter()
    driver.submit(1, fresh())
    while time.perf_counter() - start < seconds:
        driver.host.serve(1.0)
        found = driver.reap(1)
        for entry in found:
            if entry.status >> 1:
                raise SystemExit(f"status {entry.status:#x}")
            free.append(slots.pop(entry.cid))
        done += len(found)
        if free:
            driver.submit(1, fresh())
    result = done / (time.perf_counter() - start)
    while slots:
        driver.host.serve(1.0)
        for entry in driver.reap(1):
            slots.pop(entry.cid)
    return result


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(1 << 20) * (DISK >> 20))
        file.flush()
        with DeviceHost({"namespace1": file.fileno()}, {}) as host:
            driver = Driver(host)
            driver.set_up()
            for name, opcode, size, depth, sequential in (
                ("4 KiB random reads, depth 32", IoOpcode.READ, 4096, 32, False),
                ("4 KiB random writes, depth 32", IoOpcode.WRITE, 4096, 32, False),
                ("128 KiB sequential reads, depth 16", IoOpcode.READ, 131072, 16, True),
                ("128 KiB sequential writes, depth 16", IoOpcode.WRITE, 131072, 16, True),
            ):
                before = host.batches
                rate = measure(driver, opcode, size, depth, 2.0, sequential)
                messages = (host.batches - before) / (rate * 2.0)
                print(
                    f"{name:38} {rate:9,.0f} commands/s {rate * size / 1e6:8,.0f} MB/s {messages:6.2f} DMA messages/command"
                )


if __name__ == "__main__":
    main()
