"""`./devtool demo [--json FILE]`: exit status 0 if every step did what it promises, 1 if one did not, 2 for bad usage."""

from __future__ import annotations

import argparse
import json
import signal
import sys

from toolstack.demo.show import Show
from toolstack.demo.story import Story


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="devtool demo",
        description="A machine of processes: guests boot, the processes below them are killed, a device attacks; is every "
        "acknowledged write on the disk afterwards?",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write there what happened, as JSON ('-': standard output)"
    )
    options = parser.parse_args(arguments)
    # A terminal's end or a container's stop takes the machine down in order, as ^C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _frame: sys.exit(128 + signum))
    to_stdout = options.json == "-"
    show = Show(sys.stderr if to_stdout else sys.stdout)
    try:
        record = Story(show).run()
    except KeyboardInterrupt:
        return 130
    show.plain()
    show.plain("Summary")
    show.table([(step.name, step.ok, step.seconds, step.detail) for step in record.steps])
    good, total = sum(step.ok is True for step in record.steps), len(record.steps)
    verdict = "all well" if record.ok else "FAILED"
    show.plain(
        f"  {show.paint(verdict, 'good' if record.ok else 'bad')}: {good} of {total} steps, {show.elapsed():.1f} s"
    )
    if options.json:
        text = json.dumps(record.as_json(), indent=2) + "\n"
        if to_stdout:
            sys.stdout.write(text)
        else:
            try:
                with open(options.json, "w", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                print(f"demo: --json {options.json}: {error.strerror}", file=sys.stderr)
                return 2
    return 0 if record.ok else 1


if __name__ == "__main__":
    sys.exit(main())
