"""CPUID of what the vCPU can really execute: the library's own answer less what does not work.

Whoever answers a guest's CPUID starts from `Machine.native_cpuid` and takes away or adds what the *machine*
has (local APIC, MCE, MTRR, hypervisor bit, Xen's leaves). Bits that are set here were tried:
`tests/unit/vcpu/test_vcpu_features.py`.
"""

from __future__ import annotations

from typing import Final

EAX, EBX, ECX, EDX = range(4)


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


MASKED: Final[dict[tuple[int, int, int], int]] = {
    # (leaf, subleaf, register): bits that are never shown, with the reason
    (1, 0, ECX): _bits(
        2, 3,  # DTES64, MONITOR: MWAIT is #UD or nonsense
        5, 6, 7, 8, 10, 11, 15, 18,  # VMX, SMX, EIST, TM2, CNXT-ID, SDBG, PDCM, DCA: no such thing
        12, 28, 29,  # FMA, AVX, F16C: VEX-coded vectors are #UD
        17,  # PCID: INVPCID is missing
        21, 24,  # x2APIC, TSC deadline: the machine's, once their MSRs are trapped
    ),
    (1, 0, EDX): _bits(18, 21, 22, 27, 28, 29, 31),  # PSN, DS, ACPI, SS, HTT, TM, PBE
    (7, 0, EBX): ~_bits(0, 3, 7, 8) & 0xFFFFFFFF,  # all but FSGSBASE, BMI1, SMEP, BMI2: SMAP (CLAC is #UD),
    # INVPCID, AVX2, AVX512, RTM, HLE, MPX, ADX, CLFLUSHOPT, CLWB, SHA, RDSEED stay hidden; ERMS: a step of REP MOVSB takes as long as
    # one of REP MOVSQ here, and guests that see ERMS copy by the former
    (7, 0, ECX): 0xFFFFFFFF,  # UMIP, PKU, LA57, RDPID
    (7, 0, EDX): 0xFFFFFFFF,
    (0xD, 0, EAX): ~3 & 0xFFFFFFFF,  # XCR0: x87 and SSE only
    (0xD, 1, EAX): 0xFFFFFFFF,  # XSAVEOPT, XSAVEC
    (0x80000001, 0, ECX): ~_bits(0, 5, 8) & 0xFFFFFFFF,  # all but LAHF, LZCNT, PREFETCHW
}  # fmt: skip
XSAVE_SIZE: Final = 0x240
"""Bytes of an XSAVE area with x87 and SSE: 512 legacy, 64 header."""


def usable(leaf: int, subleaf: int, values: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The values of a CPUID leaf without what the vCPU cannot do."""
    out = [value & ~MASKED.get((leaf, subleaf, register), 0) for register, value in enumerate(values)]
    if leaf == 0xD:
        if subleaf == 0:
            out[EBX], out[ECX] = XSAVE_SIZE, XSAVE_SIZE
        elif subleaf >= 2:
            out = [0, 0, 0, 0]
    return out[EAX], out[EBX], out[ECX], out[EDX]
