"""The keys `vnc`, `vnclisten`, `vncdisplay`, `vncunused` and `vncpasswd` of xl.cfg(5)."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from toolstack.xlcfg.errors import ConfigError

HVM_VNC_KEYS: Final = ("vnc", "vnclisten", "vncdisplay", "vncunused", "vncpasswd")
MAX_DISPLAY: Final = 65535 - 5900
MAX_PASSWORD: Final = 8
"""Bytes that the protocol looks at (RFC 6143, 7.2.2)."""


class Vnc(BaseModel):
    """A VNC server that is wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    listen: str = "127.0.0.1"
    display: int = 0
    unused: bool = True
    """The first free display from `display` on."""
    password: str = Field(default="", repr=False, exclude=True)

    def domain_fields(self) -> dict[str, Any]:
        """Of `bus.messages.control.DomainConfig`."""
        return {
            "vnc": True,
            "vnc_listen": self.listen,
            "vnc_display": self.display,
            "vnc_unused": self.unused,
            "vnc_password": self.password,
        }


def _address(text: str) -> tuple[str, int | None]:
    """`ADDRESS[:DISPLAY]`, an IPv6 address with a display in brackets. ConfigError."""
    host, display = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigError(f"vnclisten: {text!r}: an address such as [::1]:0")
        display = rest[1:]
    elif text.count(":") == 1:
        host, _, display = text.partition(":")
    if host in ("localhost", ""):
        host = "127.0.0.1"
    try:
        host = str(ipaddress.ip_address(host))
    except ValueError:
        raise ConfigError(f"vnclisten: {text!r}: must be an IP address such as 127.0.0.1") from None
    if display and not (display.isascii() and display.isdigit() and int(display) <= MAX_DISPLAY):
        raise ConfigError(f"vnclisten: {text!r}: the display is a number from 0 to {MAX_DISPLAY}")
    return host, int(display) if display else None


def parse_vnc(texts: Mapping[str, str], numbers: Mapping[str, int]) -> Vnc | None:
    """What is wanted; None: no server. ConfigError that begins with the key."""
    listen, display = _address(texts.get("vnclisten", ""))
    if display is None:
        display = numbers.get("vncdisplay", 0)
    if not 0 <= display <= MAX_DISPLAY:
        raise ConfigError(f"vncdisplay: {display}: a number from 0 to {MAX_DISPLAY}")
    password = texts.get("vncpasswd", "")
    if len(password.encode("utf-8")) > MAX_PASSWORD:
        raise ConfigError(f"vncpasswd: the protocol looks at {MAX_PASSWORD} bytes: choose a shorter one")
    for key in ("vnc", "vncunused"):
        if numbers.get(key, 0) not in (0, 1):
            raise ConfigError(f"{key}: must be 0 or 1")
    if not numbers.get("vnc", 0):
        return None
    return Vnc(listen=listen, display=display, unused=bool(numbers.get("vncunused", 1)), password=password)
