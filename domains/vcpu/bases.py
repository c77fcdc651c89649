"""WRFSBASE and WRGSBASE of an address that is not canonical: #GP, which QEMU leaves out.

QEMU translates all four instructions to a question of a helper, whether CR4.FSGSBASE is set, and a copy between two registers of the CPU
state. The helper is led to machine code that asks the same, then looks at the instruction: of one that writes 64 bits, it looks at the
value (SDM volume 2, WRFSBASE). It costs some tenths of a microsecond, and nothing else is slower for it.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from domains.vcpu.insides import Fixed, UnknownUnicorn, described, library
from domains.vcpu.stores import lead
from domains.vcpu.thunks import Code, CodePage

GP: Final = 13
# helper_cr4_testbit(rdi CPU state, esi bit): test [rdi + cr4], esi; je refuse; ret; a NOP; refuse:
_HELPER: Final = re.compile(
    rb"\x85\xb7(....)\x74\x08\xc3\x0f\x1f\x80\x00\x00\x00\x00\x48\x83\xec\x08\xbe\x06\x00\x00\x00", re.DOTALL
)
_HELPER_BYTES: Final = 25
_REFUSE: Final = 16
_LEAD_BYTES: Final = 12


def _checked(original: int, env: int) -> Code:
    """`env`: where the CPU object has the CPU state."""
    lib = library()
    fetch = lib.address("cpu_ldub_code_x86_64")
    cr4 = (Fixed.CR + 32).to_bytes(4, "little")
    return (
        Code()
        .emit("85b7", cr4)  # test [rdi + cr4], esi
        .jump("75", "enabled")
        .tail(original + _REFUSE)
        .label("enabled")
        .emit("53", "55", "4154", "4155", "4883ec08")  # push rbx, rbp, r12, r13; sub rsp, 8
        .emit("4889fb", "488b6c2428")  # mov rbx, rdi; mov rbp, [rsp + 40]: the return address
        .emit("4881ef", env.to_bytes(4, "little"))  # sub rdi, env
        .emit("4889ee", "31d2")  # mov rsi, rbp; xor edx, edx
        .call(lib.address("cpu_restore_state_x86_64"))  # RIP is right from here on
        .emit("4c8ba3", Fixed.RIP.to_bytes(4, "little"), "31c0")  # mov r12, [rbx + RIP]; xor eax, eax
        .label("prefix")
        .emit("4189c5")  # mov r13d, eax: the last prefix, REX if there is one
        .emit("4889df", "4c89e6", "49ffc4")  # mov rdi, rbx; mov rsi, r12; inc r12
        .call(fetch)
        .emit("3c0f")  # cmp al, 0x0f
        .jump("75", "prefix back")
        .emit("4889df", "498d742401")  # mov rdi, rbx; lea rsi, [r12 + 1]
        .call(fetch)  # ModRM
        .emit("a810")  # test al, 0x10: one that writes
        .jump("74", "done")
        .emit("4489e9", "80e1f8", "80f948")  # mov ecx, r13d; and cl, 0xf8; cmp cl, 0x48: REX.W
        .jump("75", "done")
        .emit(
            "83e007", "4183e501", "41c1e503", "4409e8"
        )  # and eax, 7; and r13d, 1; shl r13d, 3; or eax, r13d
        .emit("488b04c3")  # mov rax, [rbx + 8 * rax]
        .emit("4889c1", "48c1e110", "48c1f910")  # mov rcx, rax; shl rcx, 16; sar rcx, 16
        .emit("4839c1")  # cmp rcx, rax
        .jump("74", "done")
        .emit("4889df", "be", GP.to_bytes(4, "little"), "31d2")  # mov rdi, rbx; mov esi, 13; xor edx, edx
        .emit("4889e9")  # mov rcx, rbp
        .call(lib.address("raise_exception_err_ra_x86_64"))  # does not return
        .emit("0f0b")  # ud2
        .label("prefix back")
        .jump_back("prefix")
        .label("done")
        .emit("4883c408", "415d", "415c", "5d", "5b", "c3")  # add rsp, 8; pop r13, r12, rbp, rbx; ret
    )


@functools.cache
def check_bases(env: int) -> CodePage:
    """Lead the helper to machine code, once a process, before any vCPU runs; the page is kept for its life. UnknownUnicorn if the
    library is not the one that is known."""
    lib = library()
    name = "helper_cr4_testbit_x86_64"
    code = lib.code(name, _HELPER_BYTES)
    found = _HELPER.match(code)
    if found is None or int.from_bytes(found.group(1), "little") != Fixed.CR + 32:
        raise UnknownUnicorn(f"{described()}: {name} is not as expected")
    page = CodePage()
    target = page.add(_checked(lib.address(name), env))
    page.seal()
    lead(lib.address(name), code[:_LEAD_BYTES], target)
    return page
