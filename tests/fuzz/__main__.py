"""`./devtool fuzz TARGET --seconds N --seed S [--corpus DIR] [--json FILE]`: coverage-guided fuzzing with atheris (libFuzzer).

Exit status 1 if an input crashes, hangs (10 s) or breaks an invariant: the input is then in the corpus directory, and
`./devtool fuzz TARGET --input FILE` repeats it."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = (
    "messages",
    "hypercalls",
    "ring-back",
    "ring-front",
    "net-back",
    "net-front",
    "ledger",
    "xenstore",
    "elf",
    "xlcfg",
)
HANG_S = 10


def main() -> int:
    """Start the fuzzer as a process of its own (libFuzzer ends it) and read what it says."""
    parser = argparse.ArgumentParser(prog="devtool fuzz", description=__doc__)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--corpus",
        default="",
        help="keep inputs that reach something new (default: a directory for this run)",
    )
    parser.add_argument("--json", default="", help="add the result to this file")
    parser.add_argument("--input", default="", help="run one input, and nothing else")
    options = parser.parse_args()
    if options.input:
        from tests.fuzz.targets import TARGETS

        TARGETS[options.target](Path(options.input).read_bytes())
        print("nothing went wrong")
        return 0
    with tempfile.TemporaryDirectory(prefix="domicile-fuzz-") as scratch:
        corpus = Path(options.corpus or Path(scratch) / "corpus")
        corpus.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "tests.fuzz.child", options.target, f"-max_total_time={options.seconds}", f"-seed={options.seed or 1}",
            f"-timeout={HANG_S}", "-print_final_stats=1", "-max_len=2048", "-rss_limit_mb=2048",
            f"-artifact_prefix={corpus}/", str(corpus),
        ]  # fmt: skip
        begun = time.monotonic()
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=2 * options.seconds + 120, check=False,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        text = done.stdout + done.stderr
        inputs = [int(n) for n in re.findall(r"stat::number_of_executed_units:\s*(\d+)", text)]
        coverage = [int(n) for n in re.findall(r"cov: (\d+)", text)]
        result = {
            "target": options.target, "seed": options.seed, "seconds": round(time.monotonic() - begun, 1),
            "inputs": inputs[-1] if inputs else 0, "coverage_edges": coverage[-1] if coverage else 0,
            "corpus": len(list(corpus.iterdir())), "found": done.returncode != 0,
            "command": f"./devtool fuzz {options.target} --seconds {options.seconds} --seed {options.seed}",
        }  # fmt: skip
        print(json.dumps(result))
        if options.json:
            path = Path(options.json)
            rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            rows = [row for row in rows if row["command"] != result["command"]] + [result]
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if done.returncode:
            print(text[-6000:], file=sys.stderr)
            for bad in [*corpus.glob("crash-*"), *corpus.glob("timeout-*"), *corpus.glob("oom-*")]:
                print(f"{bad.name}: {bad.read_bytes().hex()}", file=sys.stderr)
            return 1
        return 0


if __name__ == "__main__":
    sys.exit(main())
