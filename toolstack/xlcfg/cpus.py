"""Lists of processors as xl writes them: `0-3,5`, `all,^1`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

MAX_CPU: Final = 1023
_WORD: Final = re.compile(r"(\^)?([0-9]{1,5})(?:-([0-9]{1,5}))?")


def parse_cpus(text: str) -> set[int] | None:
    """The processors; None: all. ValueError says what is wrong, and the mend."""
    wanted: set[int] = set()
    every = False
    without: set[int] = set()
    for word in text.replace(" ", "").split(","):
        if word == "all":
            every = True
            continue
        if word.lstrip("^").startswith("node"):
            raise ValueError(f"{word!r}: the machine has one NUMA node: name processors")
        match = _WORD.fullmatch(word)
        if match is None:
            raise ValueError(f"{word!r}: write 3, 0-3, ^2 or all, with commas between")
        first, last = int(match[2]), int(match[3] or match[2])
        if first > last or last > MAX_CPU:
            raise ValueError(f"{word!r}: a range from low to high, up to {MAX_CPU}")
        (without if match[1] else wanted).update(range(first, last + 1))
    if every and not without:
        return None
    result = (set(range(MAX_CPU + 1)) if every else wanted) - without
    if not result:
        raise ValueError("no processor is left to run on")
    return result


def cpus_text(cpus: Iterable[int], machine: int) -> str:
    """As `xl vcpu-list` shows them: `all`, or ranges. `machine`: how many it has."""
    numbers = sorted(cpus)
    if numbers == list(range(machine)):
        return "all"
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
