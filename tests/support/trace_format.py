"""What the Trace Event Format says of a file, as a check: for where perfetto's own trace processor is not to be had.

From the format's document ("Trace Event Format", JSON object form) and from how Perfetto reads it: phases X, i, b, e, s, t, f, M; times in
microseconds; slices of a thread nest; a flow begins with s, ends with f, never goes back in time, and each of its events lies in a slice of its thread
(binding point "enclosing slice"); b and e of one (category, id) pair up; metadata names processes and threads.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from typing import Any

PHASES = {"X", "b", "e", "s", "t", "f", "M"}
ROUNDING = 0.0006
"""Microseconds: half a nanosecond of rounding on either side."""


def problems(trace: dict[str, Any]) -> list[str]:
    """Everything that is wrong with it."""
    found: list[str] = []
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    spans: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    named: set[tuple[int, int]] = set()
    processes: set[int] = set()
    used: set[tuple[int, int]] = set()
    for event in trace["traceEvents"]:
        phase = event.get("ph")
        if phase not in PHASES:
            found.append(f"phase {phase!r}")
            continue
        if not all(isinstance(event.get(key), int) for key in ("pid", "tid")) or not isinstance(
            event.get("name"), str
        ):
            found.append(f"pid, tid or name: {event}")
        if not isinstance(event.get("ts"), int | float):
            found.append(f"no time: {event}")
            continue
        where = (event["pid"], event["tid"])
        if phase == "X":
            if not isinstance(event.get("dur"), int | float) or event["dur"] < 0:
                found.append(f"no duration: {event}")
                continue
            slices[where].append((event["ts"], event["ts"] + event["dur"]))
            used.add(where)
        elif phase in "stf":
            flows[event["id"]].append(event)
        elif phase in "be":
            spans[event["cat"], event["id"]].append(event)
        elif event["name"] == "process_name":
            processes.add(event["pid"])
        elif event["name"] == "thread_name":
            named.add(where)
    found += [f"thread {where} has no name" for where in sorted(used - named)]
    found += [f"process {pid} has no name" for pid in sorted({pid for pid, _ in used} - processes)]
    for where, parts in slices.items():
        found += [f"thread {where}: {text}" for text in _nesting(parts)]
    starts = {where: sorted(parts) for where, parts in slices.items()}
    for ident, steps in flows.items():
        found += [f"flow {ident}: {text}" for text in _flow(steps, starts)]
    for key, ends in spans.items():
        found += [f"span {key}: {text}" for text in _span(ends)]
    return found


def _nesting(parts: list[tuple[float, float]]) -> list[str]:
    open_ends: list[float] = []
    for start, end in sorted(parts, key=lambda part: (part[0], -part[1])):
        while open_ends and open_ends[-1] <= start + ROUNDING:
            open_ends.pop()
        if open_ends and end > open_ends[-1] + ROUNDING:
            return [f"slice at {start} ends at {end}, after the one around it at {open_ends[-1]}"]
        open_ends.append(end)
    return []


def _flow(steps: list[dict[str, Any]], slices: dict[tuple[int, int], list[tuple[float, float]]]) -> list[str]:
    found = []
    phases = "".join(step["ph"] for step in steps)
    if phases[0] != "s" or phases[-1] != "f" or set(phases[1:-1]) - {"t"}:
        found.append(f"phases {phases}")
    times = [step["ts"] for step in steps]
    if times != sorted(times):
        found.append(f"goes back in time: {times}")
    for step in steps:
        parts = slices.get((step["pid"], step["tid"]), [])
        place = bisect.bisect_right(parts, (step["ts"] + ROUNDING, float("inf")))
        if not any(end >= step["ts"] - ROUNDING for _, end in parts[max(0, place - 200) : place]):
            found.append(f"no slice around {step}")
    return found


def _span(ends: list[dict[str, Any]]) -> list[str]:
    depth = 0
    for event in ends:
        depth += 1 if event["ph"] == "b" else -1
        if depth not in (0, 1):
            return ["begins and ends do not pair up"]
    return ["does not end"] if depth else []
