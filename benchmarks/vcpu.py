"""What a vCPU costs: `.venv/bin/python -m benchmarks.vcpu`. Prints a table; takes about ten seconds.

Guest speed with and without the block hook is measured in one run, by turns, so that their ratio holds on a busy
machine too. Hook costs are guest to guest: the instruction, the hook, the next instruction.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from unicorn import UC_HOOK_BLOCK

from domains.vcpu import machine as machine_module
from domains.vcpu.api import StopReason, Trap
from domains.vcpu.hvm_testing import HvmGuest
from domains.vcpu.testing import CODE, PvGuest

# l: mov rax,[rdi]; add rax,rcx; mov [rdi+8],rax; xor edx,edx; call f; lea rbx,[rdx+rax]; dec rcx; jnz l; syscall
# f: inc r9; ret
MIXED = bytes.fromhex("488b07 4801c8 48894708 31d2 e80d000000 488d1c02 48ffc9 75e6 0f05 9090 49ffc1 c3")
MIXED_INSTRUCTIONS = 10
TIGHT = bytes.fromhex("48ffc9 75fb 0f05")  # l: dec rcx; jnz l; syscall


def guest_without_block_hook(code: bytes) -> PvGuest:
    """A guest whose block hook was never added: it cannot be stopped from outside."""
    add = machine_module.Machine._add_hook

    def without(
        self: machine_module.Machine, kind: int, address: int, user: int = 0, instruction: int | None = None
    ) -> None:
        if kind != UC_HOOK_BLOCK:
            add(self, kind, address, user, instruction)

    machine_module.Machine._add_hook = without  # for this one measurement
    try:
        return PvGuest(code)
    finally:
        machine_module.Machine._add_hook = add


def speed(guest: PvGuest, iterations: int, instructions: int) -> float:
    """Million guest instructions a second."""
    regs = guest.vcpu.regs
    regs.rip, regs.rcx, regs.rdi, regs.rsp = CODE, iterations, 0x30000, 0x20000
    begin = time.perf_counter()
    assert guest.vcpu.run(1 << 60) is StopReason.REQUESTED
    return iterations * instructions / (time.perf_counter() - begin) / 1e6


def loop_cost(guest: PvGuest, count: int) -> float:
    """Microseconds an iteration of a loop that ends by a recorded trap."""
    guest.vcpu.regs.rip, guest.vcpu.regs.rbx = CODE, count
    begin = time.perf_counter()
    guest.run(1 << 60)
    return (time.perf_counter() - begin) / count * 1e6


def looped(instruction: str) -> bytes:
    """l: <instruction>; dec rbx; jnz l; int 0x21."""
    body = bytes.fromhex(instruction)
    return body + b"\x48\xff\xcb" + b"\x75" + bytes([(-len(body) - 5) & 0xFF]) + b"\xcd\x21"


def call_cost(function: Callable[[], object], count: int = 20_000) -> float:
    """Microseconds a call from Python."""
    begin = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - begin) / count * 1e6


def pv_hooks() -> list[tuple[str, float]]:
    """Guest-to-guest costs of the PV hooks, with the least a hook can do."""
    rows = []
    count = 100_000

    guest = PvGuest(looped("0f05"))
    guest.traps.syscall = lambda: None
    rows.append(("SYSCALL hook that does nothing", loop_cost(guest, count)))
    regs, q = guest.vcpu.regs, guest.vcpu.regs.q

    def fields() -> None:
        _ = regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.r10
        regs.rax = 0

    def words() -> None:
        _ = q[0], q[7], q[6], q[2], q[10]
        q[0] = 0

    def flags() -> None:
        regs.rflags = regs.rflags

    guest.traps.syscall = fields
    rows.append(("... and reads five registers, writes one", loop_cost(guest, count)))
    guest.traps.syscall = words
    rows.append(("... the same through `q`", loop_cost(guest, count)))
    guest.traps.syscall = flags
    rows.append(("... and reads and writes RFLAGS", loop_cost(guest, count)))

    guest = PvGuest(looped("488b042500000300"))  # mov rax,[0x30000]
    guest.set_entry(0x30000, 0)
    guest.vcpu.flush_tlb()
    faults = guest.vcpu.regs

    def skip(trap: Trap) -> None:
        if trap.vector == 14:
            faults.rip = CODE + 8
        else:
            guest.vcpu.request_stop()

    guest.traps.trap = skip
    rows.append(("#PF, hook, on behind it", loop_cost(guest, count)))
    for name, code in (("CPUID", "0fa2 48ffc3 48ffcb"), ("IN", "ec"), ("RDTSC (machine code)", "0f31")):
        if name == "CPUID":  # CPUID writes RBX: count in RBP
            body = bytes.fromhex("0fa2 48ffcd 75f9 cd21")
            guest = PvGuest(body)
            guest.vcpu.regs.rbp = count
        else:
            guest = PvGuest(looped(code))
        guest.traps.port_in = lambda port, size: 0
        guest.traps.cpuid = lambda leaf, subleaf: (0, 0, 0, 0)
        rows.append((f"{name}{' hook' if 'machine' not in name else ''}", loop_cost(guest, count)))
    return rows


def calls() -> list[tuple[str, float]]:
    """Costs of calls from Python."""
    guest = PvGuest(bytes.fromhex("0f05 ebfc"))
    vcpu, regs = guest.vcpu, guest.vcpu.regs
    context = vcpu.save_context()
    image = vcpu.save_extended()

    def switch() -> None:
        vcpu.load_context(context)
        vcpu.save_context()

    return [
        ("run to a SYSCALL that stops, and back", call_cost(lambda: vcpu.run(1000), 10_000)),
        ("flush_tlb", call_cost(vcpu.flush_tlb)),
        ("flush_page", call_cost(lambda: vcpu.flush_page(0x30000))),
        ("drop_code of a page", call_cost(lambda: vcpu.drop_code(0x40010000, 4096))),  # type: ignore[arg-type]
        ("read a register field / word", call_cost(lambda: regs.rax)),
        ("read rflags", call_cost(lambda: regs.rflags)),
        ("load_context and save_context", call_cost(switch, 5000)),
        ("save_extended", call_cost(vcpu.save_extended, 5000)),
        ("load_extended", call_cost(lambda: vcpu.load_extended(image), 5000)),
        ("guest_tsc", call_cost(vcpu.guest_tsc)),
        ("a whole PV vCPU: construct", call_cost(PvGuest, 10)),
    ]


def hvm() -> list[tuple[str, float]]:
    """Guest-to-guest costs of an HVM vCPU."""
    rows = []
    count = 50_000
    for name, body, exits in (
        ("HVM: int3, IDT, iretq", "cc", False),
        ("HVM: OUT hook", "e610", True),
        ("HVM: MMIO read", "8b0425000000e0", True),
        ("HVM: VMCALL hook", "0f01c1", True),
    ):
        if name.endswith("read"):
            body = "41b9000000e0 418b01"  # mov r9d,MMIO; mov eax,[r9]
        code = bytes.fromhex(body)
        loop = code + b"\xff\xcb" + b"\x75" + bytes([(-len(code) - 4) & 0xFF])
        guest = HvmGuest()
        # mov ebx,count; loop; out 0xf4,al; jmp $
        guest.long_mode("bb" + count.to_bytes(4, "little").hex() + loop.hex() + "e6f4ebfe")
        guest.handler(3, "48cf")
        begin = time.perf_counter()
        assert guest.run(1 << 60) is StopReason.REQUESTED
        rows.append((name, (time.perf_counter() - begin) / count * 1e6))
        assert not exits or len(guest.exits.seen) > count
    return rows


def main() -> None:
    """Measure and print."""
    table = Table("guest code", "plain", "with block hook", "ratio", title="million instructions a second")
    for name, code, iterations, instructions in (
        ("mixed loop: loads, stores, call", MIXED, 3_000_000, MIXED_INSTRUCTIONS),
        ("dec, jnz", TIGHT, 30_000_000, 2),
    ):
        plain, hooked = guest_without_block_hook(code), PvGuest(code)
        pairs = [
            (speed(plain, iterations, instructions), speed(hooked, iterations, instructions))
            for _ in range(5)
        ]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(with_hook / without for without, with_hook in pairs)
        table.add_row(name, f"{a:.0f}", f"{b:.0f}", f"{ratio:.2f}")
    costs = Table("what", "microseconds", title="costs")
    for name, value in [*pv_hooks(), *calls(), *hvm()]:
        costs.add_row(name, f"{value:.2f}")
    console = Console()
    console.print(table)
    console.print(costs)


if __name__ == "__main__":
    main()
