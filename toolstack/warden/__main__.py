"""`domicile-warden`: `python -m toolstack.warden domicile-warden NAME SETTINGS-JSON OWNER-FD`.

OWNER-FD is a descriptor whose other end the owner holds; 'none' makes the machine outlive whoever started it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys

import bus.loading  # first
from bus import privileges
from bus.log import Logger
from toolstack.warden.runtime import RuntimeDirectory
from toolstack.warden.uids import unavailable
from toolstack.warden.warden import LocalWarden


def main() -> None:
    """Entry point of the process."""
    _, _role, name, settings_text, owner = sys.argv
    settings = json.loads(settings_text)
    runtime = RuntimeDirectory(name)
    runtime.create()
    runtime.pid.write_text(str(os.getpid()), encoding="ascii")
    listeners = {}
    for label, path, kind in (
        ("control", runtime.control, socket.SOCK_SEQPACKET),
        ("xenstored", runtime.xenstore, socket.SOCK_STREAM),
    ):
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(16)
        listeners[label] = listener
    own_uids = settings.pop("own_uids", True) and not unavailable()
    settings["bus"] = str(runtime.bus)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warden = LocalWarden(runtime, own_uids=own_uids, listeners=listeners)

    def terminate(_number: int, _frame: object) -> None:
        warden.ending = "terminated"
        raise InterruptedError

    signal.signal(signal.SIGTERM, terminate)
    privileges._prctl(privileges.PR_SET_DUMPABLE, 0)
    if owner != "none":
        warden.watch(int(owner))
    try:
        warden.start_hypervisor(settings)
        warden.prestart()
        bus.loading.loaded()
        reason = warden.run()
        Logger("warden").info(reason)
    except InterruptedError:
        pass
    finally:
        if os.environ.get("DOMICILE_KEEP_LOGS", "0") not in ("", "0"):
            runtime.remove_sockets()
        else:
            runtime.remove()
        gc.freeze()  # an interpreter that ends looks for garbage once more: 30 ms, for which the command waits


if __name__ == "__main__":
    main()
