"""What `domicile run` looks for in a guest's output and types into it: no I/O, so that it can be tested to the last byte."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from toolstack.errors import InputError

WINDOW: Final = 64 * 1024
"""Bytes of output that a pattern may span; what is older is forgotten."""
_ESCAPES: Final = {
    "r": b"\r",
    "n": b"\n",
    "t": b"\t",
    "e": b"\x1b",
    "a": b"\a",
    "b": b"\b",
    "0": b"\0",
    "\\": b"\\",
    "'": b"'",
    '"': b'"',
}
_SEQUENCE: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[ -/]*[0-Z\\-~])|\r(?![\r\n])")
_UNFINISHED: Final = re.compile(rb"\r?\x1b(?:\[[0-?]{0,30}[ -/]{0,4}|[ -/]{0,4})\Z|\r\Z")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|(.)|$)", re.DOTALL)


def decode_escapes(text: str, option: str) -> bytes:
    r"""The bytes that a text with \r \n \t \e \a \b \0 \\ \' \" \xHH stands for. InputError names the option."""
    out = bytearray()
    position = 0
    for match in _ESCAPE.finditer(text):
        out += text[position : match.start()].encode("utf-8", "surrogateescape")
        position = match.end()
        if match[1] is not None:
            out.append(int(match[1], 16))
        elif match[2] in _ESCAPES:
            out += _ESCAPES[match[2]]
        else:
            raise InputError(
                f"{option} {text!r}: unknown escape {match[0]!r} at character {match.start() + 1}: "
                r"there are \r \n \t \e \a \b \0 \\ \' \" \xHH"
            )
    return bytes(out + text[position:].encode("utf-8", "surrogateescape"))


def compile_pattern(text: str, option: str) -> re.Pattern[bytes]:
    """A regular expression over console bytes (^ and $ match at lines). InputError names the option."""
    try:
        return re.compile(text.encode("utf-8", "surrogateescape"), re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{option} {text!r}: not a regular expression: {error}") from None


class Plain:
    """Output without the control sequences of a screen (ECMA-48: CSI and two-byte escapes; carriage returns within a line), which may come
    in pieces.

    A BIOS's serial console moves the cursor wherever its clock ticked, in the middle of words too.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """What is left of it."""
        text = self._rest + data
        cut = _UNFINISHED.search(text)
        at = cut.start() if cut is not None else len(text)
        self._rest = text[at:]
        return _SEQUENCE.sub(b"", text[:at])


class ConsoleScript:
    """Typing at a guest: `first` once it has written anything; then each answer when its pattern has been written.

    A pattern is looked for in what was written after the match before it. `until` is looked for after the last pair. `plain`: without
    the control sequences of a screen.
    """

    def __init__(
        self,
        first: bytes = b"",
        pairs: Iterable[tuple[re.Pattern[bytes], bytes]] = (),
        until: re.Pattern[bytes] | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self._plain = Plain() if plain else None
        self._first = first
        self._pairs = list(pairs)
        self._until = until
        self._text = bytearray()
        self.matched: str | None = None
        """What `until` matched."""
        self.written = 0
        """Bytes of output so far."""

    @property
    def waits_for(self) -> str | None:
        """The pattern that is looked for now."""
        pattern = self._pairs[0][0] if self._pairs else self._until
        return None if pattern is None else pattern.pattern.decode("utf-8", "backslashreplace")

    def feed(self, data: bytes) -> bytes:
        """Output of the guest; what to type now."""
        if not data:
            return b""
        typed = b"" if self.written else self._first
        self.written += len(data)
        if self.matched is not None or (not self._pairs and self._until is None):
            return typed
        self._text += self._plain.feed(data) if self._plain is not None else data
        while self._pairs:
            match = self._pairs[0][0].search(self._text)
            if match is None:
                break
            typed += self._pairs.pop(0)[1]
            self._forget(match.end())
        if not self._pairs and self._until is not None:
            match = self._until.search(self._text)
            if match is not None:
                self.matched = match[0].decode("utf-8", "backslashreplace")
        if len(self._text) > WINDOW:
            self._forget(len(self._text) - WINDOW)
        return typed

    def _forget(self, count: int) -> None:
        del self._text[:count]
