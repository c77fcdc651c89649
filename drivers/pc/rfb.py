"""RFB (VNC) server protocol 3.3, 3.7 and 3.8 without I/O: bytes in, events and bytes out. One object a connection.

Without a password security type None, with one VNC authentication (a challenge by DES: it keeps honest people out). True colour of 8, 16
and 32 bits; raw encoding and the pseudo-encoding DesktopSize; only lines that changed are sent. A client that names another colour mode
or speaks nonsense gets RfbError. Source: RFC 6143.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Final, NoReturn

from drivers.pc.des import vnc_response
from drivers.pc.keys import key_of_keysym
from drivers.pc.vga_render import Picture

VERSIONS: Final = {b"RFB 003.003\n": 3, b"RFB 003.007\n": 7, b"RFB 003.008\n": 8}
NONE, VNC_AUTHENTICATION = 1, 2
CHALLENGE: Final = 16
SET_FORMAT, SET_ENCODINGS, UPDATE_REQUEST, KEY, POINTER, CUT_TEXT = 0, 2, 3, 4, 5, 6
_SIZES: Final = {SET_FORMAT: 20, SET_ENCODINGS: 4, UPDATE_REQUEST: 10, KEY: 8, POINTER: 6, CUT_TEXT: 8}
RAW, DESKTOP_SIZE = 0, -223
MAX_ENCODINGS: Final = 1024
MAX_TEXT: Final = 1 << 20
MAX_INPUT: Final = 1 << 16
"""Bytes that may wait for the rest of their message."""
WHEEL_UP, WHEEL_DOWN = 8, 16
_FORMAT: Final = struct.Struct(">BBBBHHHBBB3x")


FREE_TRIES: Final = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class RfbError(Exception):
    """The client broke the protocol, or asked for what is not there: close the connection."""


class NotNow(RfbError):
    """A password that was not looked at: too many were wrong."""


class Attempts:
    """Passwords of one server's clients. After FREE_TRIES wrong ones in a row none is looked at for a second, and after each further
    wrong one for twice as long, up to a minute: whoever guesses has some 1,500 tries a day. The right one starts anew. Clients that are
    in are not concerned; whoever keeps guessing keeps others out, too."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` is a clock in seconds that never goes back."""
        self._now: Final = now
        self.wrong = 0
        """In a row."""
        self._until = now()

    @property
    def pause(self) -> float:
        """How long no password is looked at, s; 0: the next one is."""
        return max(0.0, self._until - self._now())

    def failed(self) -> float:
        """One was wrong. How long none is looked at from now on, s."""
        self.wrong += 1
        doublings = self.wrong - FREE_TRIES
        if doublings < 0:
            return 0.0
        pause = min(FIRST_PAUSE_S * 2.0 ** min(doublings, 16), LONGEST_PAUSE_S)
        self._until = self._now() + pause
        return pause

    def succeeded(self) -> None:
        """One was right."""
        self.wrong = 0


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """A key of `keys.SCAN1` went down or up."""

    key: str
    pressed: bool


@dataclass(frozen=True, slots=True)
class PointerEvent:
    """The pointer moved: right, up, wheel up; buttons as `ps2.Mouse.move` has them."""

    dx: int
    dy: int
    wheel: int
    buttons: int


Event = KeyEvent | PointerEvent


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """What a pixel is, as the client wants it."""

    bits: int = 32
    big_endian: bool = False
    maxima: tuple[int, int, int] = (255, 255, 255)
    shifts: tuple[int, int, int] = (16, 8, 0)

    def tables(self) -> list[list[bytes]]:
        """For each byte of a pixel, what each colour's 256 values put there."""
        size = self.bits // 8
        order = range(size - 1, -1, -1) if self.big_endian else range(size)
        return [
            [
                bytes((value * most // 255 << shift) >> 8 * place & 0xFF for value in range(256))
                for most, shift in zip(self.maxima, self.shifts, strict=True)
            ]
            for place in order
        ]


def _depth(maxima: tuple[int, int, int]) -> int:
    return sum(most.bit_length() for most in maxima)


class RfbServer:
    """A connection. Take `output()` whenever something was done; give a picture with `update` while `wants_update`."""

    def __init__(
        self,
        name: str,
        width: int,
        height: int,
        *,
        password: bytes = b"",
        challenge: bytes = b"",
        attempts: Attempts | None = None,
    ) -> None:
        """`password`: its first eight bytes count; with one, `challenge` is 16 random bytes of this connection's own, and `attempts`
        are the server's (None: it has no other connections)."""
        if password and len(challenge) != CHALLENGE:
            raise ValueError(f"a challenge has {CHALLENGE} bytes")
        self._attempts: Final = attempts or Attempts(lambda: 0.0)
        self._password: Final = password
        self._challenge: Final = challenge
        self._security: Final = VNC_AUTHENTICATION if password else NONE
        self._name: Final = name.encode("utf-8", "replace")[:256]
        self._size = width, height
        self._input = bytearray()
        self._out = bytearray(b"RFB 003.008\n")
        self._state = "version"
        self._minor = 8
        self._skip = 0  # bytes of a text that is still coming
        self._format = PixelFormat()
        self._tables: list[list[bytes]] | None = None
        self._can_resize = False
        self._asked: tuple[bool, int, int, int, int] | None = None
        self._shown: Picture | None = None
        self._pointer: tuple[int, int] | None = None
        self._buttons = 0
        self._held: set[str] = set()

    def output(self) -> bytes:
        """Bytes for the client, once."""
        out = bytes(self._out)
        self._out.clear()
        return out

    @property
    def wants_update(self) -> bool:
        """It asked for a picture and has none yet, and has taken all that was sent."""
        return self._asked is not None and not self._out

    @property
    def ready(self) -> bool:
        """The handshake is over."""
        return self._state == "normal"

    def close(self) -> list[Event]:
        """The connection is gone: keys and buttons that it held go up."""
        events: list[Event] = [KeyEvent(key, False) for key in sorted(self._held)]
        if self._buttons:
            events.append(PointerEvent(0, 0, 0, 0))
        self._held.clear()
        self._buttons = 0
        return events

    # -- in -------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Event]:
        """Bytes from the client. RfbError."""
        self._input += data
        events: list[Event] = []
        while self._step(events):
            pass
        if len(self._input) > MAX_INPUT:
            raise RfbError("a message that does not end")
        return events

    def _take(self, length: int) -> bytes:
        piece = bytes(self._input[:length])
        del self._input[:length]
        return piece

    def _step(self, events: list[Event]) -> bool:
        """Handle one message; False: it is not complete."""
        if self._skip:
            done = min(self._skip, len(self._input))
            self._skip -= done
            del self._input[:done]
            return bool(done)
        have = len(self._input)
        if self._state == "version":
            if have < 12:
                return False
            self._hello(self._take(12))
            return True
        if self._state in ("security", "init"):
            if not have:
                return False
            value = self._take(1)[0]
            if self._state == "init":
                self._initialize()
            elif value != self._security:
                raise RfbError(f"security type {value}")
            else:
                self._secure()
            return True
        if self._state == "challenge":
            if have < CHALLENGE:
                return False
            self._check(self._take(CHALLENGE))
            return True
        if not have:
            return False
        return self._message(self._input[0], have, events)

    def _hello(self, version: bytes) -> None:
        if version[:4] != b"RFB " or version[11:] != b"\n":
            raise RfbError(f"no RFB client: {version!r}")
        self._minor = VERSIONS.get(version, 3 if version < b"RFB 003.007\n" else 8)
        if self._minor == 3:
            self._out += struct.pack(">I", self._security)
            self._secure()
        else:
            self._out += bytes((1, self._security))
            self._state = "security"

    def _secure(self) -> None:
        """The security type is agreed on."""
        if self._security == VNC_AUTHENTICATION:
            self._out += self._challenge
            self._state = "challenge"
            return
        if self._minor == 8:
            self._out += struct.pack(">I", 0)
        self._state = "init"

    def _check(self, response: bytes) -> None:
        attempts = self._attempts
        if attempts.pause:
            self._refuse(f"too many wrong passwords: try again in {ceil(attempts.pause)} s", NotNow)
        if not hmac.compare_digest(response, vnc_response(self._password, self._challenge)):
            pause = attempts.failed()
            why = f", the {attempts.wrong}th in a row: for {pause:.0f} s none is looked at" if pause else ""
            self._refuse(f"wrong password{why}", RfbError)
        attempts.succeeded()
        self._out += struct.pack(">I", 0)
        self._state = "init"

    def _refuse(self, reason: str, kind: type[RfbError]) -> NoReturn:
        self._out += struct.pack(">I", 1)
        if self._minor == 8:
            self._out += struct.pack(">I", len(reason)) + reason.encode("ascii")
        raise kind(reason)

    def _initialize(self) -> None:
        form = self._format
        self._out += struct.pack(">HH", *self._size)
        self._out += _FORMAT.pack(
            form.bits, _depth(form.maxima), form.big_endian, 1, *form.maxima, *form.shifts
        )
        self._out += struct.pack(">I", len(self._name)) + self._name
        self._state = "normal"

    def _message(self, kind: int, have: int, events: list[Event]) -> bool:
        size = _SIZES.get(kind)
        if size is None:
            raise RfbError(f"message {kind}")
        if have < size:
            return False
        if kind == SET_ENCODINGS:
            count = int.from_bytes(self._input[2:4], "big")
            if count > MAX_ENCODINGS:
                raise RfbError(f"{count} encodings")
            if have < 4 + 4 * count:
                return False
            self._can_resize = DESKTOP_SIZE in struct.unpack(f">{count}i", self._take(4 + 4 * count)[4:])
            return True
        body = self._take(size)
        if kind == SET_FORMAT:
            self._set_format(body[4:])
        elif kind == UPDATE_REQUEST:
            incremental, x, y, width, height = struct.unpack(">xBHHHH", body)
            waiting = self._asked is not None and not self._asked[0]
            self._asked = bool(incremental) and not waiting, x, y, width, height
        elif kind == KEY:
            pressed, keysym = struct.unpack(">xB2xI", body)
            self._key(pressed, keysym, events)
        elif kind == POINTER:
            events.extend(self._pointer_moved(*struct.unpack(">xBHH", body)))
        else:
            length = int.from_bytes(body[4:], "big")
            if length > MAX_TEXT:
                raise RfbError(f"a text of {length} bytes")
            self._skip = length
        return True

    def _set_format(self, body: bytes) -> None:
        bits, _, big, true, *rest = _FORMAT.unpack(body)
        maxima, shifts = (rest[0], rest[1], rest[2]), (rest[3], rest[4], rest[5])
        if bits not in (8, 16, 32) or not true:
            raise RfbError(f"pixels of {bits} bits, true colour {true}")
        if any(
            most & most + 1 or most > 255 or most << shift >> bits
            for most, shift in zip(maxima, shifts, strict=True)
        ):
            raise RfbError(f"colours {maxima} at {shifts}")
        self._format = PixelFormat(bits, bool(big), maxima, shifts)
        self._tables = None  # made when a picture is: a client may send any number of formats
        self._shown = None

    def _key(self, pressed: int, keysym: int, events: list[Event]) -> None:
        key = key_of_keysym(keysym)
        if key is None:
            return
        if pressed:
            self._held.add(key)
        else:
            self._held.discard(key)
        events.append(KeyEvent(key, bool(pressed)))

    def _pointer_moved(self, mask: int, x: int, y: int) -> list[Event]:
        dx, dy = (0, 0) if self._pointer is None else (x - self._pointer[0], self._pointer[1] - y)
        # RFB: left, middle, right; PS/2: left, right, middle.
        buttons = mask & 1 | (mask & 2) << 1 | (mask & 4) >> 1
        wheel = bool(mask & WHEEL_UP) - bool(mask & WHEEL_DOWN)
        changed = buttons != self._buttons or dx or dy or wheel
        self._pointer, self._buttons = (x, y), buttons
        return [PointerEvent(dx, dy, wheel, buttons)] if changed else []

    # -- out ------------------------------------------------------------------------------------------------------

    def update(self, picture: Picture) -> bool:
        """Answer the client's request with what changed; False: nothing did, and it goes on waiting."""
        if self._asked is None or not self.ready:
            return False
        incremental, _, top, _, height = self._asked
        old = self._shown
        if (picture.width, picture.height) != self._size:
            if self._can_resize:
                self._size = picture.width, picture.height
                self._out += struct.pack(">BxHHHHHi", 0, 1, 0, 0, *self._size, DESKTOP_SIZE)
                self._asked = self._shown = None
                return True
            picture, old = self._fitted(picture), old
        pitch = 3 * picture.width
        bottom = min(top + height, picture.height)
        if not incremental or old is None:
            runs = [(top, bottom)] if top < bottom else []
        else:
            runs = self._changed(old.rgb, picture.rgb, pitch, top, bottom)
            if not runs:
                return False
        self._out += struct.pack(">BxH", 0, len(runs))
        for start, end in runs:
            self._out += struct.pack(">HHHHi", 0, start, picture.width, end - start, RAW)
            self._out += self._pixels(picture.rgb[start * pitch : end * pitch])
        if old is not None and (top, bottom) != (0, picture.height):
            kept = bytearray(old.rgb)
            kept[top * pitch : bottom * pitch] = picture.rgb[top * pitch : bottom * pitch]
            picture = Picture(picture.width, picture.height, bytes(kept))
        elif (top, bottom) != (0, picture.height):
            picture = None  # type: ignore[assignment]
        self._shown = picture
        self._asked = None
        return True

    @staticmethod
    def _changed(old: bytes, new: bytes, pitch: int, top: int, bottom: int) -> list[tuple[int, int]]:
        """Runs of lines that differ."""
        if old == new:
            return []
        runs: list[tuple[int, int]] = []
        for line in range(top, bottom):
            at = line * pitch
            if old[at : at + pitch] != new[at : at + pitch]:
                if runs and runs[-1][1] == line:
                    runs[-1] = runs[-1][0], line + 1
                else:
                    runs.append((line, line + 1))
        return runs

    def _fitted(self, picture: Picture) -> Picture:
        """Cut or framed in black to the size that a client without DesktopSize was told."""
        width, height = self._size
        pitch, line = 3 * picture.width, 3 * width
        lines = [
            picture.rgb[row * pitch : row * pitch + min(pitch, line)].ljust(line, b"\0")
            for row in range(min(height, picture.height))
        ]
        return Picture(width, height, b"".join(lines).ljust(line * height, b"\0"))

    def _pixels(self, rgb: bytes) -> bytes:
        size = self._format.bits // 8
        count = len(rgb) // 3
        colours = [rgb[part::3] for part in range(3)]
        out = bytearray(count * size)
        if self._tables is None:
            self._tables = self._format.tables()
        for place, tables in enumerate(self._tables):
            total = 0
            for colour, table in zip(colours, tables, strict=True):
                if any(table):
                    total |= int.from_bytes(colour.translate(table), "little")
            out[place::size] = total.to_bytes(count, "little")
        return bytes(out)
