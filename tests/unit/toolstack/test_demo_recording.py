"""The demo's recording and its picture: what a terminal showed is what they show; those in docs/ belong together."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from toolstack.demo.recording import COLUMNS, END_S, IDLE_S, draw, from_cast, record, to_cast
from toolstack.demo.show import Show

FIGURES = Path(__file__).parents[3] / "docs" / "figures"
TEXT = "{http://www.w3.org/2000/svg}text"
SET = "{http://www.w3.org/2000/svg}set"


def texts(svg: str) -> list[str]:
    """Lines of text of a picture."""
    return ["".join(one.itertext()) for one in ET.fromstring(svg).iter(TEXT)]


def test_a_line_that_is_written_over_is_gone_and_colours_are_the_terminals() -> None:
    """And at any second the picture has what stood there."""
    events = [
        (0.0, "\r\x1b[K  | waits (0 s)"),
        (0.5, "\r\x1b[K"),
        (0.5, "\x1b[32mgood & <well>\x1b[0m\r\n"),
        (1.2, "end\r\n"),
    ]
    assert texts(draw(events, at=0.2)) == ["  | waits (0 s)"]
    assert texts(draw(events, at=0.9)) == ["good & <well>"]
    assert texts(draw(events)) == ["  | waits (0 s)", "good & <well>", "end"]
    assert 'fill="#7ee787">good &amp; &lt;well&gt;' in draw(events)


def test_waits_are_cut_and_all_is_there_at_the_end() -> None:
    """A minute in which nothing happens is a second of the picture."""
    events = [(0.0, "begin\r\n"), (60.0, "end\r\n")]
    svg = draw(events)
    assert f'dur="{IDLE_S + END_S:.2f}s"' in svg
    assert texts(draw(events, at=IDLE_S + 0.1)) == ["begin", "end"]


def test_more_lines_than_a_screen_scroll_and_long_ones_are_cut_at_its_edge() -> None:
    events = [(0.1 * n, f"line {n} {'x' * 120}\r\n") for n in range(40)]
    svg = draw(events)
    assert "animateTransform" in svg
    assert all(len(text) == COLUMNS for text in texts(svg))


def test_a_sequence_that_it_does_not_know_is_an_error() -> None:
    """No picture of something that did not look like this."""
    with pytest.raises(ValueError, match="not understood"):
        draw([(0.0, "\x1b[9;7Hx")])


def test_what_runs_on_a_terminal_is_recorded() -> None:
    """With colours, as there is one; and the exit status."""
    code = "from toolstack.demo.show import Show; s = Show(); s.line('done', 'good'); raise SystemExit(3)"
    events, status = record([sys.executable, "-c", code])
    assert status == 3
    again = from_cast(to_cast(events, "a title"))
    assert again == events
    (line,) = texts(draw(again))
    assert line.endswith("s] done")
    assert "\x1b[32m" in "".join(text for _, text in again)


def test_a_guests_words_do_not_move_the_terminals_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """The line that shows a wait has what the guest printed last."""
    show = Show(sys.stdout)
    show.moves = True
    with show.waiting("it boots") as waiting:
        waiting.tick("\x1b[9;7Hgrub>\x07\x1b[0m")
    assert "(0 s) grub>" in capsys.readouterr().out.replace("\r\x1b[K", "")


def test_the_picture_of_the_readme_is_that_of_the_recording() -> None:
    """Whose run ended well; both are small enough to be fetched with a page."""
    cast, svg = FIGURES / "demo.cast", FIGURES / "demo.svg"
    events = from_cast(cast.read_text(encoding="utf-8"))
    assert draw(events) == svg.read_text(encoding="utf-8")
    assert "all well" in "".join(text for _, text in events)
    assert cast.stat().st_size + svg.stat().st_size < 300_000
