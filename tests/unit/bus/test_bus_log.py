"""Structured logs: every line is an object with who, when and what."""

from __future__ import annotations

import json
import sys

import pytest

from bus.log import MAX_LINE, Logger


def test_a_line_has_time_level_role_event_and_what_was_bound(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger("domio").bind(vbd="backend/vbd/1/51712")
    logger.warning("two\nlines", sector=7, nothing=None)
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time") > 1.6e9
    assert line == {
        "level": "warning",
        "role": "domio",
        "vbd": "backend/vbd/1/51712",
        "event": "two\nlines",
        "sector": 7,
    }


def test_whatever_is_said_is_one_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    Logger("dom0").info("x\n" * MAX_LINE, object=object())
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert len(text) == MAX_LINE + 1


def test_a_log_that_cannot_be_written_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  # closing it fails as well
    monkeypatch.setattr(sys, "stderr", full)
    Logger("dom0").info("lost")
    with pytest.raises(OSError, match="No space"):
        full.close()
