"""The envelope of every message: msgpack of [version, kind, fields], and the hard limits.

A message is one ZeroMQ frame, or one packet of a SOCK_SEQPACKET socket. It is decoded with caps on every length before a
model sees it, and then validated by the pydantic model of its kind. Whatever fails is a `BadMessage`, whose text names the
thing; the receiver refuses the message, counts it, and goes on.
"""

import _thread
from typing import Any, ClassVar, Final, Self, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

VERSION: Final = 1
"""Version of the bus protocol. Both ends must have the same."""

MAX_MESSAGE: Final = 64 * 1024
"""Largest encoded message, in bytes."""
MAX_DATA: Final = 60 * 1024
"""Largest payload of ABI structures in one message, in bytes."""
MAX_ITEMS: Final = 4096
"""Most elements in any list or map of a message."""
MAX_DESCRIPTORS: Final = 64
"""Most file descriptors that travel with one message (the kernel's own limit is 253)."""


class BadMessage(ValueError):
    """A message that does not decode or validate; the text says what is wrong with it."""


_put = object.__setattr__
_SET: Final[set[str]] = set()
"""Of messages that were made, whose fields nobody asks whether they were given."""


class Message(BaseModel):
    """Base of all messages. Unknown fields are refused; values are never coerced.

    The validator of a kind is built when it is first used (`defer_build`): a process uses a few of the kinds that it loads, and
    building them all is a tenth of its start. What is needed to build any is loaded by `ready`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)
    KIND: ClassVar[str] = ""

    @classmethod
    def made(cls, **fields: Any) -> Self:
        """A message whose fields the caller made itself, all of them and in the model's order: they are not checked (which takes most of the
        time). The receiver checks what was encoded, as always."""
        message = cls.__new__(cls)
        _put(message, "__dict__", fields)
        _put(message, "__pydantic_fields_set__", _SET)
        _put(message, "__pydantic_extra__", None)
        _put(message, "__pydantic_private__", None)
        return message


M = TypeVar("M", bound=Message)
Registry = dict[str, type[Message]]


def registry(*models: type[Message]) -> Registry:
    """The kinds that may arrive on one link, by name."""
    table: Registry = {}
    for model in models:
        if not model.KIND or model.KIND in table:
            raise TypeError(f"{model.__name__}: KIND missing or used twice")
        table[model.KIND] = model
    return table


def ready(kinds: Registry) -> None:
    """Build the validators of these kinds now. With the first one the builder's own code is loaded, which cannot be done any more once a
    process has given up its privileges: its uid may not reach that."""
    for model in kinds.values():
        model.model_rebuild()


def encode(message: Message) -> bytes:
    """The message's bytes. BadMessage if they exceed MAX_MESSAGE, or if it holds what msgpack has no form for."""
    return encode_trusted(message.KIND, message.__dict__)  # that is its fields, in order


def encode_trusted(kind: str, fields: dict[str, Any]) -> bytes:
    """The bytes of a message whose fields the caller made itself and in the model's order: no model is built to check them (which takes
    longer than all the rest). The receiver checks as always. BadMessage as in `encode`."""
    try:
        raw: bytes = _kept.pack([VERSION, kind, fields])
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise BadMessage(f"{kind}: cannot be encoded: {error}"[:300]) from None
    if len(raw) > MAX_MESSAGE:
        raise BadMessage(f"{kind}: {len(raw)} bytes, over the limit of {MAX_MESSAGE}")
    return raw


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    raise TypeError(f"cannot encode {type(value).__name__}")


class _Kept(_thread._local):
    """A packer for each thread: a new one for each message allocates a buffer each time, which is half of the cost."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(use_bin_type=True, default=_plain).pack


_kept = _Kept()


def decode(raw: bytes, kinds: Registry) -> Message:
    """The validated message. BadMessage names what is wrong; never any other exception."""
    if len(raw) > MAX_MESSAGE:
        raise BadMessage(f"{len(raw)} bytes, over the limit of {MAX_MESSAGE}")
    try:
        outer = msgpack.unpackb(
            raw,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_str_len=MAX_DATA,
            max_bin_len=MAX_DATA,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (
        Exception
    ) as error:  # msgpack raises a dozen kinds, UnicodeDecodeError and RecursionError among them
        raise BadMessage(f"not msgpack: {type(error).__name__}: {str(error)[:100]}") from None
    if not isinstance(outer, list) or len(outer) != 3:
        raise BadMessage("not an envelope of [version, kind, fields]")
    version, kind, fields = outer
    if version != VERSION or isinstance(version, bool):
        raise BadMessage(f"bus version {str(version)[:20]!r}, expected {VERSION}")
    model = kinds.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise BadMessage(f"unknown kind {str(kind)[:40]!r}")
    try:
        return model.__pydantic_validator__.validate_python(fields)  # type: ignore[no-any-return]  # of that model
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "fields"
        raise BadMessage(f"{kind}: {where}: {first['msg']}"[:300]) from None
    except RecursionError:
        raise BadMessage(f"{kind}: nested too deeply") from None
