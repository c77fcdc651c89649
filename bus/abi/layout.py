"""C structure layouts as data: typed NamedTuples with a packed form (x86-64 System V rules).

A structure of the guest ABI is a `NamedTuple` whose fields are annotated with the types below, and a `Layout`
made from it::

    class evtchn_send(NamedTuple):
        port: u32

    EVTCHN_SEND = Layout(evtchn_send)
    EVTCHN_SEND.unpack(data).port

Fields take their natural alignment, as the C compiler gives it; padding is written as zero and ignored when read.
`packed=True` leaves the padding out (`__attribute__((packed))`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, Any, Final, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T", bound=tuple[Any, ...])
Buffer = bytes | bytearray | memoryview


class Prim(NamedTuple):
    """A primitive C type: its `struct` code and size (= alignment) in bytes."""

    code: str
    size: int


class Array(NamedTuple):
    """`count` elements of a primitive or of a structure; the field's value is a tuple."""

    element: Any
    count: int


class Bytes(NamedTuple):
    """`count` raw bytes (`char x[count]`); the field's value is `bytes` of that very length."""

    count: int


u8 = Annotated[int, Prim("B", 1)]
u16 = Annotated[int, Prim("H", 2)]
u32 = Annotated[int, Prim("I", 4)]
u64 = Annotated[int, Prim("Q", 8)]
i8 = Annotated[int, Prim("b", 1)]
i16 = Annotated[int, Prim("h", 2)]
i32 = Annotated[int, Prim("i", 4)]
i64 = Annotated[int, Prim("q", 8)]
handle = u64
"""XEN_GUEST_HANDLE(x) of a 64-bit guest: a guest-virtual address."""


class LayoutError(ValueError):
    """A buffer is too short for the structure, or a value does not fit its field."""


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


class _Field(NamedTuple):
    name: str
    offset: int
    size: int
    slots: int  # how many values of the flat struct.Struct it takes
    kind: Any  # Prim | Array | Bytes | Layout


class Layout(Generic[T]):
    """Size, offsets and conversion of one C structure."""

    def __init__(self, record: type[T], *, packed: bool = False) -> None:
        self.record: Final = record
        self.name: Final[str] = record.__name__
        hints = get_type_hints(record, include_extras=True)
        code, offset, align, fields = "<", 0, 1, list[_Field]()
        for name in record._fields:  # type: ignore[attr-defined]  # a NamedTuple, which has no type of its own
            kind, item_code, size, natural, slots = _describe(hints[name], packed)
            if not packed:
                pad = -offset % natural
                code += f"{pad}x" if pad else ""
                offset += pad
                align = max(align, natural)
            fields.append(_Field(name, offset, size, slots, kind))
            code += item_code
            offset += size
        tail = 0 if packed else -offset % align
        self.code: Final = code[1:] + (f"{tail}x" if tail else "")
        self.align: Final = align
        self._struct: Final = struct.Struct("<" + self.code)
        self.size: Final = self._struct.size
        self._fields: Final = tuple(fields)
        self._by_name: Final[Mapping[str, _Field]] = {f.name: f for f in fields}
        self._flat: Final = all(isinstance(f.kind, (Prim, Bytes)) for f in fields)
        self._slots: Final = sum(f.slots for f in fields)

    def offset(self, field: str) -> int:
        """Byte offset of `field` in the structure. KeyError if there is none of that name."""
        return self._by_name[field].offset

    def field_size(self, field: str) -> int:
        """Size of `field` in bytes."""
        return self._by_name[field].size

    def unpack(self, data: Buffer, offset: int = 0) -> T:
        """The structure at `offset` of `data`. LayoutError if `data` is too short."""
        try:
            values = self._struct.unpack_from(data, offset)
        except struct.error as error:
            raise LayoutError(f"{self.name}: {self.size} bytes needed at {offset}: {error}") from None
        if self._flat:
            return self.record(*values)  # type: ignore[call-arg,arg-type]  # T is a NamedTuple of these very fields
        return self._build(iter(values))

    def pack(self, value: T) -> bytes:
        """The structure's bytes. LayoutError if a value does not fit its field."""
        try:
            if self._flat:
                return self._struct.pack(*value)
            return self._struct.pack(*self._spread(value))
        except (struct.error, TypeError) as error:
            raise LayoutError(f"{self.name}: {error}") from None

    def pack_into(self, buffer: bytearray | memoryview, offset: int, value: T) -> None:
        """Write the structure's bytes at `offset` of `buffer`."""
        buffer[offset : offset + self.size] = self.pack(value)

    def _build(self, values: Any) -> T:
        out: list[Any] = []
        for field in self._fields:
            kind = field.kind
            if isinstance(kind, Array):
                if isinstance(kind.element, Layout):
                    out.append(tuple(kind.element._build(values) for _ in range(kind.count)))
                else:
                    out.append(tuple(next(values) for _ in range(kind.count)))
            elif isinstance(kind, Layout):
                out.append(kind._build(values))
            else:
                out.append(next(values))
        return self.record(*out)  # type: ignore[call-arg,arg-type]  # as in unpack

    def _spread(self, value: Any) -> list[Any]:
        out: list[Any] = []
        for field, item in zip(self._fields, value, strict=True):
            kind = field.kind
            if isinstance(kind, Array):
                if len(item) != kind.count:
                    raise struct.error(f"{field.name}: {kind.count} elements needed, {len(item)} given")
                for element in item:
                    out.extend(kind.element._spread(element) if isinstance(kind.element, Layout) else (element,))
            elif isinstance(kind, Layout):
                out.extend(kind._spread(item))
            else:
                out.append(item)
        return out


_cache: dict[tuple[type, bool], Layout[Any]] = {}


def _nested(record: type, packed: bool) -> Layout[Any]:
    key = (record, packed)
    if key not in _cache:
        _cache[key] = Layout(record, packed=packed)
    return _cache[key]


def _describe(hint: Any, packed: bool) -> tuple[Any, str, int, int, int]:
    """(kind, struct code, size, alignment, slots) of one annotated field."""
    if _is_struct(hint):
        layout = _nested(hint, packed)
        return layout, layout.code, layout.size, layout.align, layout._slots
    if get_origin(hint) is not Annotated:
        raise TypeError(f"not an ABI type: {hint!r}")
    kind = get_args(hint)[1]
    if isinstance(kind, Prim):
        return kind, kind.code, kind.size, kind.size, 1
    if isinstance(kind, Bytes):
        return kind, f"{kind.count}s", kind.count, 1, 1
    if isinstance(kind, Array):
        inner, code, size, align, slots = _describe(kind.element, packed)
        element = inner if isinstance(inner, Layout) else kind.element
        return Array(element, kind.count), code * kind.count, size * kind.count, align, slots * kind.count
    raise TypeError(f"not an ABI type: {hint!r}")
