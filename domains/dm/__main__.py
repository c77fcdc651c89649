"""`domicile-dm`: the device model of one HVM guest."""

from __future__ import annotations

import sys

import bus.loading  # noqa: F401  # first
from bus import privileges
from bus.link import HypervisorGone
from bus.packets import LinkClosed
from bus.process import begin
from domains.dm.guest import GuestGone
from domains.dm.process import ModelProcess
from domains.native.reactor import Reactor


def main() -> None:
    """Entry point of the process."""
    start = begin(privileges.Limits(open_files=1024, processes=16))
    process = ModelProcess(start, Reactor())
    try:
        process.run()
    except (HypervisorGone, GuestGone, LinkClosed) as gone:
        sys.exit(f"dm: {gone}")
    except Exception as error:
        process.failed(error)
        raise


if __name__ == "__main__":
    main()
