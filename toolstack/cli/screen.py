"""`domicile screenshot` and `send-key`: the screen and the keyboard of a full HVM guest."""

from __future__ import annotations

import os
from collections.abc import Sequence

from drivers.pc.keys import keys_of_character
from drivers.pc.vga_render import Picture
from toolstack import screenshot
from toolstack.cli.output import warn
from toolstack.cli.state import connect
from toolstack.cli.terminal import write_all
from toolstack.errors import InputError


def take(domain: str) -> Picture:
    """The screen as it is now. MachineError."""
    client = connect()
    try:
        return screenshot.take(client, domain)
    finally:
        client.close()


def save(domain: str, file: str) -> None:
    """Into a file, or to standard output for '-'. InputError."""
    png = take(domain).png()
    if file == "-":
        write_all(png)
        return
    if not file.endswith(".png"):
        warn(f"{file}: what is written there is PNG")
    try:
        with open(file, "wb") as target:
            target.write(png)
    except OSError as error:
        raise InputError(f"screenshot {file}: {os.strerror(error.errno or 0)}") from None


def key_names(words: Sequence[str], *, text: bool) -> list[str]:
    """Combinations of keys, as the device model takes them; of a text, those that type it. InputError."""
    if not text:
        return [word.lower() for word in words]
    try:
        return ["-".join(keys_of_character(character)) for character in " ".join(words)]
    except ValueError as error:
        raise InputError(f"send-key: {error}") from None
