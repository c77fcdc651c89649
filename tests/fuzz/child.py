"""The fuzzer's process: `python -m tests.fuzz.child TARGET LIBFUZZER-OPTIONS... CORPUS`."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris


def main() -> None:
    """Instrument what guides the target, seed the corpus, and never come back."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=_packages(name), enable_loader_override=False):
        from tests.fuzz.targets import TARGETS, seeds
    corpus = Path(sys.argv[-1])
    for number, data in enumerate(seeds(name)):
        path = corpus / f"seed-{number}"
        if not path.exists():
            path.write_bytes(data)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


def _packages(name: str) -> list[str]:
    """As `targets.INSTRUMENTED`, which cannot be imported before it is instrumented."""
    return {
        "messages": ["bus"], "hypercalls": ["hypervisor.core", "bus.abi"], "ring-back": ["drivers.block"], "ring-front": ["drivers.block"],
        "net-back": ["drivers.net"], "net-front": ["drivers.net"],
        "ledger": ["drivers.block"], "xenstore": ["domains.dom0.xenstore", "drivers.xenbus"], "elf": ["domains.dom0.builder", "elftools.elf"],
        "xlcfg": ["toolstack.xlcfg"],
    }[name]  # fmt: skip


if __name__ == "__main__":
    main()
