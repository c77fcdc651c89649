"""Two samples of a machine, two seconds apart."""

from __future__ import annotations

from dataclasses import replace

from toolstack.top.model import Domain, Sample, Vbd, Vcpu

WEB = Domain(
    3, "web", "-----r", 42.0, 262144, 524288,
    vcpus=(Vcpu(0, 0, "running", 20.5), Vcpu(1, 1, "blocked", 21.5)),
    vbds=(Vbd("xvda", 51712, 3, 1200, 80, 12, 1, 48000, 1700), Vbd("xvdb", 51728, 0, 7, 9, 0, 0, 211, 80)),
)  # fmt: skip
DOM0 = Domain(0, "Domain-0", "--b---", 12.3, 16384, 0, vcpus=(Vcpu(0, 0, "blocked", 12.3),))
DOMIO = Domain(1, "DomIO", "--b---", 9.1, 32768, 32768, 1, vcpus=(Vcpu(0, 1, "blocked", 9.1),))
PAUSED = Domain(
    12, "build-machine-of-somebody", "----p-", 123456.0, 1048576, 1048576, vcpus=(Vcpu(0, 0, "offline", 0.0),)
)


def sample() -> Sample:
    """The first."""
    return Sample(100.0, "11:22:33", "default", 2, 4194304, 2834432, (DOM0, DOMIO, WEB, PAUSED))


def later_sample() -> Sample:
    """The second."""
    domains = (replace(DOM0, seconds=12.5), replace(DOMIO, seconds=9.5), replace(WEB, seconds=43.0), PAUSED)
    return replace(sample(), time=102.0, domains=domains)
