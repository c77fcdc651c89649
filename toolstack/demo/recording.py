"""The demo, recorded: `./devtool recording` runs it on a terminal and writes down what that showed, and when.

    python -m toolstack.demo.recording CAST SVG       run the demo; its recording, and a picture of it that moves
    python -m toolstack.demo.recording --draw CAST SVG [--at SECONDS]      the picture of a recording that is there

The recording is in asciinema's format (asciicast v2: a header, then [seconds, "o", text] a line), with the times as they were. The
picture cuts waits to IDLE_S; the seconds that the demo prints are the true ones. Without animation it shows the end.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from fcntl import ioctl
from html import escape
from pathlib import Path
from typing import Final

COLUMNS, ROWS = 120, 28
IDLE_S: Final = 1.0
"""The picture's longest wait."""
END_S: Final = 6.0
"""How long it stands at the end."""
STEP_S: Final = 0.25
"""Changes of one line within this time are one in the picture."""
LIMIT_S: Final = 600.0
CELL: Final = (8.4, 18.0)
COLOURS: Final = {"32": "#7ee787", "31;1": "#ff7b72", "2": "#8b949e", "1": "#ffffff"}
"""By the terminal's codes (toolstack.demo.show)."""
PLAIN: Final = "#c9d1d9"
_TOKEN: Final = re.compile(r"\x1b\[([0-9;]*)m|\x1b\[K|\r|\n|[^\x1b\r\n]+")
Event = tuple[float, str]
Spans = tuple[tuple[str, str], ...]
"""A line: pieces of text, each with its colour."""


@dataclass(slots=True)
class Shown:
    """What stood in a row, from one time to another."""

    row: int
    spans: Spans
    begin: float
    end: float | None = None


@dataclass(slots=True)
class Screen:
    """As much of a terminal as the demo needs: lines, a line that is written over, colours."""

    shown: list[Shown] = field(default_factory=list)
    row: int = 0
    colour: str = PLAIN
    _spans: list[tuple[str, str]] = field(default_factory=list)
    _last: Shown | None = None

    def write(self, now: float, text: str) -> None:
        """ValueError for a control sequence that is none of these."""
        at = 0
        for found in _TOKEN.finditer(text):
            if found.start() != at:
                break
            at = found.end()
            token = found[0]
            if token in ("\r", "\x1b[K"):
                if token == "\x1b[K":  # comes after \r alone
                    self._spans.clear()
            elif token == "\n":
                self._flush(now)
                self.row, self._last = self.row + 1, None
                self._spans.clear()
            elif token.startswith("\x1b["):
                self.colour = COLOURS.get(found[1], PLAIN)
            else:
                self._spans.append((token, self.colour))
        if at != len(text):
            raise ValueError(f"not understood: {text[at : at + 20]!r}")
        self._flush(now)

    def _flush(self, now: float) -> None:
        spans = tuple(self._spans)
        last = self._last
        if last is not None and last.spans == spans:
            return
        if last is not None:
            last.end = now
            self._last = None
        if spans:
            self._last = Shown(self.row, spans, now)
            self.shown.append(self._last)


def record(command: list[str]) -> tuple[list[Event], int]:
    """Run it on a terminal of its own: what that showed, and the exit status."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        os.environ.pop("NO_COLOR", None)
        os.execvp(command[0], command)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    events: list[Event] = []
    begin = time.monotonic()
    try:
        while True:
            if not select.select([terminal], [], [], LIMIT_S)[0]:
                raise TimeoutError(f"nothing for {LIMIT_S:.0f} s")
            try:
                data = os.read(terminal, 1 << 16)
            except OSError:  # EIO: the other end is closed
                break
            if not data:
                break
            text = decoder.decode(data)
            os.write(1, data)
            if text:
                events.append((round(time.monotonic() - begin, 3), text))
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    return events, os.waitstatus_to_exitcode(status)


def to_cast(events: Iterable[Event], title: str) -> str:
    """As asciicast v2."""
    header = {
        "version": 2,
        "width": COLUMNS,
        "height": ROWS,
        "title": title,
        "env": {"TERM": "xterm-256color"},
    }
    return "".join(
        json.dumps(line) + "\n" for line in (header, *([when, "o", text] for when, text in events))
    )


def from_cast(text: str) -> list[Event]:
    """ValueError if it is none of version 2."""
    header, *rows = [json.loads(line) for line in text.splitlines()]
    if header.get("version") != 2:
        raise ValueError("no asciicast of version 2")
    return [(float(when), str(data)) for when, kind, data in rows if kind == "o"]


def _paced(events: Iterable[Event]) -> Iterable[Event]:
    """With waits cut; what changes fast, at most once in STEP_S unless a line ends with it."""
    now = last = 0.0
    held = ""
    told = -STEP_S
    for when, text in events:
        now += min(when - last, IDLE_S)
        last = when
        held += text
        if "\n" in held or now - told >= STEP_S:
            yield now, held
            held, told = "", now
    if held:
        yield now, held


def draw(events: Iterable[Event], at: float | None = None) -> str:
    """The picture: moving, or (`at`) as it is at that second."""
    screen, end = Screen(), 0.0
    for when, text in _paced(events):
        screen.write(when, text.replace("\r\n", "\n"))
        end = when
    length = end + END_S
    width, height = CELL
    tops: list[tuple[float, int]] = [(0.0, 0)]
    for one in screen.shown:
        top = max(0, one.row - ROWS + 1)
        if top > tops[-1][1]:
            tops.append((one.begin, top))
    moment = length if at is None else at
    top = [row for when, row in tops if when <= moment][-1]
    size = (COLUMNS * width + 24, ROWS * height + 24)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]:g} {size[1]:g}" width="{size[0]:g}" height="{size[1]:g}" '
        f'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,\'DejaVu Sans Mono\',monospace" font-size="14" xml:space="preserve">',
        "<title>A recording of ./devtool demo</title>",
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/><svg x="12" y="12" width="{COLUMNS * width:g}" height="{ROWS * height:g}">',
    ]
    if at is None:
        parts.append(
            f'<rect width="0" height="0"><animate id="m" attributeName="x" from="0" to="0" begin="0s;m.end" dur="{length:.2f}s"/></rect>'
        )
    parts.append(f'<g transform="translate(0 {-top * height:g})">')
    if at is None and len(tops) > 1:
        values = ";".join(f"0 {-row * height:g}" for _, row in tops)
        times = ";".join(f"{when / length:.4f}" for when, _ in tops)
        parts.append(
            f'<animateTransform attributeName="transform" type="translate" calcMode="discrete" begin="m.begin" dur="{length:.2f}s" '
            f'values="{values}" keyTimes="{times}"/>'
        )
    for one in screen.shown:
        there = one.begin <= moment and (one.end is None or one.end > moment)
        if at is None or there:
            parts.append(_line(one, moving=at is None))
    parts.append("</g></svg></svg>\n")
    return "\n".join(parts)


def _line(one: Shown, *, moving: bool) -> str:
    text = "".join(piece for piece, _ in one.spans)[:COLUMNS]
    words, left = "", COLUMNS
    for piece, colour in one.spans:
        shown, left = piece[:left], left - len(piece[:left])
        words += (
            escape(shown, quote=False)
            if colour == PLAIN
            else f'<tspan fill="{colour}">{escape(shown, quote=False)}</tspan>'
        )
    motion, start = "", ""
    if moving:
        if one.end is None:  # there at the end: what does not move shows it
            motion = f'<set attributeName="visibility" to="hidden" begin="m.begin" end="m.begin+{one.begin:.2f}s"/>'
        else:
            start = ' visibility="hidden"'
            motion = f'<set attributeName="visibility" to="visible" begin="m.begin+{one.begin:.2f}s" end="m.begin+{one.end:.2f}s"/>'
    return f'<text y="{(one.row + 0.75) * CELL[1]:g}" fill="{PLAIN}" textLength="{len(text) * CELL[0]:g}"{start}>{words}{motion}</text>'


def main() -> int:
    """Exit status: 0; 1 if the demo failed: nothing is written then."""
    parser = argparse.ArgumentParser(prog="recording", description="Record the demo.")
    parser.add_argument(
        "--draw", action="store_true", help="the recording is there: only the picture is made"
    )
    parser.add_argument("--at", type=float, help="a picture that stands still, of that second")
    parser.add_argument("cast", type=Path)
    parser.add_argument("svg", type=Path)
    options = parser.parse_args()
    if not options.draw:
        events, status = record([sys.executable, "-m", "toolstack.demo"])
        if status:
            print(f"recording: the demo ended with status {status}: nothing is written", file=sys.stderr)
            return 1
        options.cast.write_text(to_cast(events, "./devtool demo"), encoding="utf-8")
    events = from_cast(options.cast.read_text(encoding="utf-8"))
    options.svg.write_text(draw(events, options.at), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
