"""What tracing costs: `python -m benchmarks.trace`. Off: the test of one word, and a guest's hypercall with it; on: a record, and a hypercall."""

from __future__ import annotations

import os
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any, cast

from bus.trace import ON_WORD, Kind, Trace
from bus.trace_page import NAME, Page, of_process
from domains.pv.hypercalls import Hypercalls

ROUNDS = 7
CALLS = 200_000


def best(what: Callable[[], object], calls: int = CALLS) -> float:
    """ns of one call, the median of several rounds."""
    return statistics.median(timeit.repeat(what, number=calls, repeat=ROUNDS)) / calls * 1e9


class Cpu:
    """Of a hypercall that does nothing."""

    class current:
        id = 0


def hypercalls(trace: Trace | None) -> float:
    """ns of a hypercall that does nothing, through the dispatcher."""
    calls = Hypercalls(cast(Any, Cpu()), {0: lambda a1, a2, a3, a4, a5: 0})
    if trace is not None:
        calls.trace = trace
    return best(lambda: calls.call(0, 1, 2, 3, 4, 5))


def main() -> None:
    """Print the figures."""
    page = Page("benchmark")
    trace, _ = of_process({NAME: os.dup(page.fd)})
    nothing = best(lambda: None)
    on = trace.on

    def test() -> None:
        if on[0]:
            raise AssertionError

    off_call = hypercalls(trace)
    print(f"a test while off                     {best(test) - nothing:7.0f} ns")
    print(f"a hypercall that does nothing, off   {off_call:7.0f} ns")
    trace.words[ON_WORD] = 1
    print(
        f"a record                             {best(lambda: trace.add(Kind.RUN, 0, 0, 1, 2, 3)) - nothing:7.0f} ns"
    )
    print(f"a hypercall that does nothing, on    {hypercalls(trace):7.0f} ns")
    print(f"memory of a process's page           {page.memory.nbytes >> 10:7d} KiB, once written")
    print(f"(time.monotonic_ns itself            {best(time.monotonic_ns):7.0f} ns)")
    trace.close()
    page.close()


if __name__ == "__main__":
    main()
