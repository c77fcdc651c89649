"""Imported before all else by the main module of a machine's process: no garbage is looked for while its code is loaded.

There is next to none then, and looking for it is a twentieth of the time. `bus.process.begin` turns the search on again (the warden
its own). Nothing happens in other programs that import such a module, as tests do.
"""

from __future__ import annotations

import gc
import sys

THRESHOLDS = (10_000, 20, 20)
"""A batch of requests is thousands of objects for a moment, none of them garbage that only a search would find: at Python's own 700 a
twentieth of a disk's time went into searches."""

if len(sys.argv) > 1 and sys.argv[1].startswith("domicile-"):
    gc.disable()


def loaded() -> None:
    """What is there now stays: no search for garbage will look at it."""
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    gc.enable()
