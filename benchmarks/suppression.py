"""Races of event suppression (tests/support/suppression.py): python benchmarks/suppression.py [--races N] [--native] [--no-fence] [--json FILE]

Exit status 1 if a wake-up was lost and the frontend had fenced. --no-fence shows that the program sees lost wake-ups: some are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.suppression import races


def main() -> None:
    """Print the outcome."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--races", type=int, default=1_000_000)
    parser.add_argument("--native", action="store_true", help="the back end is this project's own code")
    parser.add_argument("--no-fence", action="store_true", help="the frontend does not order")
    parser.add_argument("--json", metavar="FILE", help="append the outcome to that list")
    args = parser.parse_args()
    start = time.monotonic()
    outcome = races(args.races, fence=not args.no_fence, native=args.native)
    told = {
        **outcome._asdict(),
        "fence": not args.no_fence,
        "back_end": "native" if args.native else "vCPU",
        "seconds": round(time.monotonic() - start, 1),
        "load": round(os.getloadavg()[0], 1),
        "command": " ".join(["python benchmarks/suppression.py", *_without(sys.argv[1:])]),
    }
    print(json.dumps(told))
    if args.json:
        path = Path(args.json)
        path.write_text(
            json.dumps([*(json.loads(path.read_text()) if path.exists() else []), told], indent=1) + "\n"
        )
    sys.exit(bool(outcome.lost and not args.no_fence))


def _without(arguments: list[str]) -> list[str]:
    """All but --json."""
    if "--json" in arguments:
        at = arguments.index("--json")
        return arguments[:at] + arguments[at + 2 :]
    return arguments


if __name__ == "__main__":
    main()
