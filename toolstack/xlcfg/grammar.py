r"""The grammar of xl.cfg(5): `key = value` and `key += value`, ended by a newline or a semicolon.

A value is a string ('...' or "...", with the escapes of C), a number (decimal, octal with a leading 0, hexadecimal with 0x) or a list
[value, ...], which may span lines, nest, and end in a comma. `#` starts a comment. `+=` appends to a string or to a list.
A key that is set twice keeps its last value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from lark import Lark, Token
from lark.exceptions import LarkError, UnexpectedCharacters, UnexpectedInput, VisitError

from toolstack.xlcfg.errors import ConfigError

MAX_SIZE: Final = 1 << 20
"""Characters in a configuration."""
MAX_DEPTH: Final = 16
"""Lists within lists."""
MAX_NUMBER: Final = (1 << 63) - 1

_GRAMMAR: Final = r"""
start: _sep* (setting (_sep+ setting)* _sep*)?
_sep: NEWLINE | ";"
setting: KEY OPERATOR _value
_value: string | number | list
string: STRING
number: NUMBER
list: OPEN _nl* (_value _nl* ("," _nl* _value _nl*)* ("," _nl*)?)? "]"
_nl: NEWLINE
OPEN: "["
OPERATOR: "=" | "+="
KEY: /[a-z][_0-9a-z]*/
NUMBER: /[0-9][0-9a-zA-Z_]*/
STRING: /"(?:[^"\\\n]|\\.)*"/ | /'(?:[^'\\\n]|\\.)*'/
NEWLINE: /\r?\n/
%ignore /[ \t]+/
%ignore /#[^\n]*/
"""
_NAMED: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_ESCAPE: Final = re.compile(r"\\(?:x([0-9A-Fa-f]{1,2})|([0-7]{1,3})|(.))")


@dataclass(frozen=True, slots=True)
class Value:
    """A value and where it stands."""

    data: str | int | list[Value]
    line: int
    column: int
    depth: int = 0

    def plain(self) -> Any:
        """Without positions."""
        return [item.plain() for item in self.data] if isinstance(self.data, list) else self.data

    @property
    def kind(self) -> str:
        """For messages."""
        return {str: "a string", int: "a number", list: "a list"}[type(self.data)]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a key was set to, and where the key stands."""

    key: str
    value: Value
    line: int
    column: int


class _Bad(Exception):
    def __init__(self, text: str, token: Token) -> None:
        super().__init__(text)
        self.token = token


class _Build:
    """Called for each rule as it is reduced, so that no depth of nesting recurses here."""

    def start(self, children: list[Any]) -> list[Any]:
        return [child for child in children if not isinstance(child, Token)]

    def setting(self, children: list[Any]) -> tuple[Token, Token, Value]:
        key, operator, value = children
        return key, operator, value

    def string(self, children: list[Any]) -> Value:
        token: Token = children[0]
        return Value(_dequote(token), token.line or 0, token.column or 0)

    def number(self, children: list[Any]) -> Value:
        token: Token = children[0]
        return Value(_number(token), token.line or 0, token.column or 0)

    def list(self, children: list[Any]) -> Value:
        opening: Token = children[0]
        items = [child for child in children if isinstance(child, Value)]
        depth = 1 + max((item.depth for item in items), default=0)
        if depth > MAX_DEPTH:
            raise _Bad(f"lists nest more than {MAX_DEPTH} deep", opening)
        return Value(items, opening.line or 0, opening.column or 0, depth)


def _number(token: Token) -> int:
    text = str(token)
    try:
        octal = len(text) > 1 and text[0] == "0" and text[1] not in "xX"
        value = int(text, 8 if octal else 16 if text[:2].lower() == "0x" else 10) if "_" not in text else -1
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_NUMBER:
        raise _Bad(
            f"{text[:40]!r} is no number (decimal, octal 0..., hexadecimal 0x..., at most 2^63 - 1)", token
        )
    return value


def _dequote(token: Token) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1] is not None:
            code = int(match[1], 16)
        elif match[2] is not None:
            code = int(match[2], 8)
        elif match[3] in _NAMED:
            return _NAMED[match[3]]
        elif match[3] in "\\'\"?":
            return match[3]
        else:
            raise _Bad(f"unknown escape \\{match[3]}: write \\\\ for a backslash", token)
        if not 0 < code < 256:
            raise _Bad(f"escape {match[0]} is no byte from 1 to 255", token)
        return chr(code)

    return _ESCAPE.sub(replace, str(token)[1:-1])


_PARSER: Final = Lark(_GRAMMAR, parser="lalr", transformer=_Build(), maybe_placeholders=False)


def parse(text: str, source: str) -> dict[str, Setting]:
    """Every key's last setting, in the order of the first. ConfigError with line and column."""
    if len(text) > MAX_SIZE:
        raise ConfigError(f"longer than {MAX_SIZE} characters: this is no configuration", source)
    if "\0" in text:
        raise ConfigError("holds zero bytes: this is no configuration (is it the kernel?)", source)
    try:
        statements: Any = _PARSER.parse(text)
    except UnexpectedInput as error:
        token = getattr(error, "token", None)
        at = (error.line, error.column)
        if token is not None and token.type == "$END":  # it stands where the last token began
            at = (token.end_line, token.end_column)
        raise ConfigError(_explain(error, text), source, _line(at[0]), _line(at[1])) from None
    except (_Bad, VisitError) as error:
        bad = error.orig_exc if isinstance(error, VisitError) else error
        if not isinstance(bad, _Bad):
            raise
        raise ConfigError(str(bad), source, bad.token.line or 0, bad.token.column or 0) from None
    except (LarkError, RecursionError) as error:
        raise ConfigError(f"cannot be read: {type(error).__name__}", source) from None
    settings: dict[str, Setting] = {}
    for key, operator, value in statements:
        name, line, column = str(key), key.line or 0, key.column or 0
        if str(operator) == "+=" and name in settings:
            value = _appended(settings[name].value, value, name, source)
        settings[name] = Setting(name, value, line, column)
    return settings


def _line(number: int | None) -> int:
    return number if isinstance(number, int) and number > 0 else 1


def _appended(before: Value, more: Value, key: str, source: str) -> Value:
    if isinstance(before.data, str) and isinstance(more.data, str):
        return Value(before.data + more.data, before.line, before.column)
    if isinstance(before.data, list) and isinstance(more.data, list):
        depth = max(before.depth, more.depth)
        return Value(before.data + more.data, before.line, before.column, depth)
    raise ConfigError(
        f"{key} += {more.kind}, but {key} is {before.kind}: append a string to a string, or a list to a list",
        source,
        more.line,
        more.column,
    )


def _explain(error: UnexpectedInput, text: str) -> str:
    if isinstance(error, UnexpectedCharacters):
        rest = text[error.pos_in_stream :].split("\n", 1)[0][:30]
        if rest[:1] in "\"'":
            return f"the string {rest!r} does not end on its line"
        if rest[:1].isalpha() and rest[:1].isupper():
            return f"{rest!r}: keys are lower-case; strings stand in quotes"
        hint = (
            " (this is no Python any more: numbers, strings and lists only)" if rest[:1] in "+-.():" else ""
        )
        return f"unexpected {rest!r}{hint}"
    token = getattr(error, "token", None)
    shown = str(token)
    if token is None or token.type == "$END":
        return "unexpected end: a value or a closing ']' is missing"
    if token.type == "NEWLINE":
        return "unexpected end of the line: a value is missing"
    if token.type == "KEY":
        return f"unexpected {shown[:30]!r}: strings stand in quotes, and each setting on a line of its own"
    return f"unexpected {shown[:30]!r}"
