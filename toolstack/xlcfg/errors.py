"""What is wrong with a configuration, and where."""

from __future__ import annotations

from toolstack.errors import InputError


class ConfigError(InputError):
    """`source` is the file (or option), `line` and `column` count from 1; 0 where there is no position."""

    def __init__(self, text: str, source: str = "", line: int = 0, column: int = 0) -> None:
        place = source + (f":{line}:{column}" if line else "")
        super().__init__(f"{place}: {text}" if place else text)
        self.text = text
        self.source = source
        self.line = line
        self.column = column
