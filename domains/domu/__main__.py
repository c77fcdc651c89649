"""`domicile-domu`: the process of a guest."""

from __future__ import annotations

import sys

import bus.loading  # noqa: F401  # first
from bus import privileges
from bus.link import HypervisorGone
from bus.process import begin
from domains.domu.hvm_process import GuestProcess


def main() -> None:
    """Entry point of the process."""
    sys.setswitchinterval(1e-4)  # the ear must get its turn at once (docs/vcpu.md)
    start = begin(privileges.Limits(open_files=4096, processes=8, oom_score=700))
    process = GuestProcess(start)
    try:
        process.run()
    except HypervisorGone as gone:
        sys.exit(f"domu: {gone}")
    except Exception as error:
        process.report_failure(error)
        raise


if __name__ == "__main__":
    main()
