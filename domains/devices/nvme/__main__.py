"""`domicile-nvme`: an NVMe controller as a process.

Descriptors: 'keys', 'descriptors' (the link), 'trace', and for each namespace N from 1 on 'namespaceN' (raw: the disk; with an overlay: the
base, never written), and optionally 'namespaceN.overlay' and 'namespaceN.bitmap' (what was written, and where), 'namespaceN.backing'
(what a qcow2 image refers to).
Settings: 'serial', 'model', and for each namespace 'namespaceN': {'format': 'raw' | 'qcow2', 'read_only': bool, 'block': 512 | 4096}.
"""

from __future__ import annotations

import sys

import bus.loading  # noqa: F401  # first
from bus import privileges, trace_page
from bus.process import begin
from domains.devices.nvme.disks import DiskError, open_disks
from domains.devices.nvme.model import kind, namespaces
from domains.devices.runtime import DeviceProcess
from drivers.hw.nvme.media import MediaError
from drivers.hw.nvme.pages import Identity


def main() -> None:
    """Entry point of the process."""
    start = begin(privileges.Limits(open_files=256, processes=16, oom_score=-200))
    try:
        media, shifts = open_disks(start.fds, start.settings)
        identity = Identity(
            serial=str(start.settings.get("serial", start.name))[:20],
            model=str(start.settings.get("model", "Domicile NVMe controller"))[:40],
            namespaces=namespaces(media, shifts),
        )
    except (DiskError, MediaError, ValueError) as error:
        sys.exit(f"nvme: {error}")
    trace, _ = trace_page.of_process(start.fds)
    DeviceProcess(start, kind(identity, media, trace)).run()


if __name__ == "__main__":
    main()
