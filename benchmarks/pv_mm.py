"""Micro-benchmark of the PV memory management: `python benchmarks/pv_mm.py`. Figures: nanoseconds an entry or call.

* mmu_update: batches of 256 and single requests that map a page elsewhere, and that change flags only.
* fork: pin and unpin of an L4 tree whose one L1 table has 500 entries (the kernel's half is shared).
* hypercall arguments: one 16-byte read by virtual address.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from bus.abi import xen
from tests.unit.pvmm.pvmm_support import BASE, KERNEL_RO, KERNEL_RW, TABLE, Guest

ROUNDS = 5


def best(work: Callable[[], None], units: int) -> float:
    """Nanoseconds of processor time a unit, the best of some rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time_ns()
        work()
        times.append(time.process_time_ns() - start)
    return min(times) / units


def main() -> None:
    """Print the table."""
    guest = Guest(ram=512)
    mmu, at = guest.mmu, guest.va(BASE + 100)
    entry = guest.pte(BASE + 50)

    def batch(values: list[int]) -> bytes:
        return b"".join(struct.pack("<QQ", entry, value) for value in values * (256 // len(values)))

    def updates(count: int, calls: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(calls):
                mmu.mmu_update(at, count, 0, xen.DOMID_SELF)

        return work

    remap = [BASE + 60 << 12 | KERNEL_RW, BASE + 61 << 12 | KERNEL_RW]
    flags = [BASE + 60 << 12 | KERNEL_RO, BASE + 60 << 12 | KERNEL_RO | 1 << 63]
    for name, values in (("remap", remap), ("flags", flags)):
        mmu.write_virtual(at, batch(values))
        print(f"mmu_update {name}, batch of 256: {best(updates(256, 100), 25600):8.0f} ns/entry")
        print(f"mmu_update {name}, single:       {best(updates(1, 10000), 10000):8.0f} ns/call")

    def va_mapping() -> None:
        for n in range(10000):
            mmu.update_va_mapping(guest.va(BASE + 50), remap[n & 1], 0)

    print(f"update_va_mapping:               {best(va_mapping, 10000):8.0f} ns/call")

    tables = [BASE + 200, BASE + 201, BASE + 202, BASE + 203]
    guest.update(*((guest.pte(mfn), mfn << 12 | KERNEL_RO) for mfn in tables))
    l4, l3, l2, l1 = tables
    guest.store(l4, 0, l3 << 12 | TABLE)
    guest.store(l4, 272, guest.load(guest.l4, 272))
    guest.store(l3, 0, l2 << 12 | TABLE)
    guest.store(l2, 0, l1 << 12 | TABLE)
    for slot in range(500):
        guest.store(l1, slot, BASE + 5 + slot % 90 << 12 | (0x67 if slot & 1 else 0x65))

    def fork() -> None:
        for _ in range(100):
            mmu.mmuext_op(at, 1, 0, xen.DOMID_SELF)
            mmu.mmuext_op(at + 32, 1, 0, xen.DOMID_SELF)

    mmu.write_virtual(at, struct.pack("<QQQ", xen.MMUEXT_PIN_L4_TABLE, l4, 0))
    mmu.write_virtual(at + 32, struct.pack("<QQQ", xen.MMUEXT_UNPIN_TABLE, l4, 0))
    print(f"pin + unpin, 500 entries:        {best(fork, 100):8.0f} ns/pair")

    def read() -> None:
        for _ in range(10000):
            mmu.read_virtual(at, 16)

    print(f"read_virtual, 16 bytes:          {best(read, 10000):8.0f} ns/call")
    mmu.write_virtual(at, struct.pack("<QQQ", xen.MMUEXT_INVLPG_LOCAL, 0, 0))

    def invlpg() -> None:
        for _ in range(10000):
            mmu.mmuext_op(at, 1, 0, xen.DOMID_SELF)

    print(f"mmuext_op INVLPG, single:        {best(invlpg, 10000):8.0f} ns/call (without the flush itself)")
    problems = mmu.check_invariants()
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
