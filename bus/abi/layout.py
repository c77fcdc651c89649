"""C structure layouts as data: typed NamedTuples with a packed form (x86-64 System V rules).

A structure of the guest ABI is a `NamedTuple` whose fields are annotated with the types below, and a `Layout`
made from it::

    class evtchn_send(NamedTuple):
        port: u32

    EVTCHN_SEND = Layout(evtchn_send)
    EVTCHN_SEND.unpack(data).port

Fields take their natural alignment, as the C compiler gives it; padding is written as zero and ignored when
read. `packed=True` leaves the padding out (`__attribute__((packed))`). A C union is one field of `Union`: its
value is the raw bytes, which the caller packs and unpacks with the layout of the member that the other fields
select.

The modules of `bus/abi` do without `from __future__ import annotations`: it makes each annotation a string, which `NamedTuple`
then compiles, 1,500 of them at the start of each process.

`tests/unit/abi/test_abi_layouts.py` compares every `Layout` of `bus/abi` with what the C compiler makes of
the headers. `c` and `c_fields` tell it the C type, and the C names of fields that a NamedTuple cannot have:
a leading underscore is dropped, `count` and `index` (methods of tuples) become `count_` and `index_`.
"""

import struct
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any, Final, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T", bound=tuple[Any, ...])
Buffer = bytes | bytearray | memoryview


class Prim(NamedTuple):
    """A primitive C type: its `struct` code and size (= alignment) in bytes."""

    code: str
    size: int


class Array(NamedTuple):
    """`length` elements of a primitive or of a structure; the field's value is a tuple."""

    element: Any
    length: int


class Bytes(NamedTuple):
    """`length` raw bytes (`char x[length]`); the field's value is `bytes` of that very length."""

    length: int


class Union:
    """A C union: the field's value is raw bytes, as long as the largest member and aligned as the strictest.

    A shorter value is allowed when packing (one member's bytes); the rest is written as zero.
    """

    def __init__(self, **members: Any) -> None:
        self.members: Final[Mapping[str, Any]] = members


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
    kind: Any  # Prim | Array | Bytes | Union | Layout


_MEASURED: Final = frozenset({"code", "align", "size", "_struct", "_fields", "_by_name", "_flat", "_raw"})


class Layout(Generic[T]):
    """Size, offsets and conversion of one C structure.

    `c` is the C type when it is not `struct <name of the record>`; `c_fields` gives a field's C name where it
    differs, or "" for one that has no address of its own in C (bit-fields).
    """

    code: str
    """For the struct module, without byte order."""
    align: int
    size: int
    """Both in bytes."""
    _struct: struct.Struct
    _fields: tuple[_Field, ...]
    _by_name: Mapping[str, _Field]
    _flat: bool
    _raw: tuple[tuple[int, _Field], ...]

    def __init__(
        self, record: type[T], *, packed: bool = False, c: str = "", c_fields: Mapping[str, str] | None = None
    ) -> None:
        self.record: Final = record
        self.name: Final[str] = record.__name__
        self.c_type: Final[str] = c or f"struct {self.name}"
        self._c_fields: Final[Mapping[str, str]] = c_fields or {}
        self._packed: Final = packed

    def __getattr__(self, name: str) -> Any:
        """What is known once the record was measured. That is done when it is first asked for: a process uses a few of the
        two hundred structures, and measuring all of them would take a tenth of a second of its start."""
        if name not in _MEASURED or "size" in self.__dict__:
            raise AttributeError(name)
        self._measure()
        return self.__dict__[name]

    def _measure(self) -> None:
        record, packed = self.record, self._packed
        hints = get_type_hints(record, include_extras=True)
        code, offset, align, fields = "<", 0, 1, list[_Field]()
        for name in record._fields:  # type: ignore[attr-defined]  # a NamedTuple, which has no type of its own
            kind, item_code, size, natural = _describe(hints[name], packed)
            if not packed:
                pad = -offset % natural
                code += f"{pad}x" if pad else ""
                offset += pad
                align = max(align, natural)
            fields.append(_Field(name, offset, size, kind))
            code += item_code
            offset += size
        tail = 0 if packed else -offset % align
        self.code = code[1:] + (f"{tail}x" if tail else "")
        self.align = align
        self._struct = struct.Struct("<" + self.code)
        self._fields = tuple(fields)
        self._by_name = {f.name: f for f in fields}
        self._flat = all(isinstance(f.kind, (Prim, Bytes, Union)) for f in fields)
        self._raw = tuple((i, f) for i, f in enumerate(fields) if isinstance(f.kind, (Bytes, Union)))
        self.size = self._struct.size

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in order."""
        return tuple(self._by_name)

    def c_field(self, field: str) -> str:
        """The C name (or path) of `field`; "" if it has no address in C."""
        return self._c_fields.get(field, field)

    def offset(self, field: str) -> int:
        """Byte offset of `field` in the structure. KeyError if there is none of that name."""
        return self._by_name[field].offset

    def field_size(self, field: str) -> int:
        """Size of `field` in bytes."""
        return self._by_name[field].size

    def union(self, field: str) -> Mapping[str, Any]:
        """The members of a union field: name and type (a primitive or a structure)."""
        kind = self._by_name[field].kind
        if not isinstance(kind, Union):
            raise TypeError(f"{self.name}.{field} is not a union")
        return kind.members

    def unpack(self, data: Buffer, offset: int = 0) -> T:
        """The structure at `offset` of `data`. LayoutError if `data` is too short."""
        try:
            values = self._struct.unpack_from(data, offset)
        except struct.error as error:
            raise LayoutError(f"{self.name}: {self.size} bytes needed at {offset}: {error}") from None
        if self._flat:
            return tuple.__new__(self.record, values)
        return self._build(values)

    def unpack_array(self, data: Buffer, count: int, offset: int = 0) -> list[T]:
        """`count` structures that follow one another. LayoutError if `data` is too short."""
        return [self.unpack(data, offset + i * self.size) for i in range(count)]

    def pack(self, value: T) -> bytes:
        """The structure's bytes. LayoutError if a value does not fit its field."""
        try:
            if not self._flat:
                return self._struct.pack(*self._spread(value))
            for index, field in self._raw:
                _check_raw(value[index], field.size, isinstance(field.kind, Bytes), field.name)
            return self._struct.pack(*value)
        except (struct.error, TypeError, IndexError, ValueError) as error:
            raise LayoutError(f"{self.name}: {error}") from None

    def pack_into(self, buffer: bytearray | memoryview, offset: int, value: T) -> None:
        """Write the structure's bytes at `offset` of `buffer`. LayoutError if it does not fit in."""
        if offset < 0 or offset + self.size > len(buffer):
            raise LayoutError(
                f"{self.name}: {self.size} bytes at {offset} are outside a buffer of {len(buffer)}"
            )
        buffer[offset : offset + self.size] = self.pack(value)

    def zero(self) -> T:
        """The structure with all its bytes zero; for `._replace(...)`."""
        return self.unpack(bytes(self.size))

    @cached_property
    def _build(self) -> Callable[[tuple[Any, ...]], T]:
        """From the flat values of the struct module to the record."""
        return _compile_build(self)

    @cached_property
    def _spread(self) -> Callable[[T], tuple[Any, ...]]:
        """From the record to the flat values of the struct module."""
        return _compile_spread(self)


def _compile_build(layout: Layout[Any]) -> Callable[[tuple[Any, ...]], Any]:
    """An unrolled conversion for one layout, as `namedtuple` itself is made: five to ten times as fast as a
    walk over the fields, and nested structures are on the path of every grant copy and block request. The
    text has only numbers and names of its own."""
    names: dict[str, Any] = {
        "new": tuple.__new__
    }  # what a NamedTuple's own constructor calls, without its cost
    position = 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return position - count

    def text(kind: Any) -> str:
        if isinstance(kind, Layout):
            name = f"r{len(names)}"
            names[name] = kind.record
            return f"new({name}, ({''.join(text(field.kind) + ', ' for field in kind._fields)}))"
        if isinstance(kind, Array):
            if isinstance(kind.element, Prim):
                start = take(kind.length)
                return f"v[{start}:{start + kind.length}]"
            return f"({''.join(text(kind.element) + ', ' for _ in range(kind.length))})"
        return f"v[{take(1)}]"

    made: Callable[[tuple[Any, ...]], Any] = eval(f"lambda v: {text(layout)}", names)
    return made


def _compile_spread(layout: Layout[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """The opposite of `_compile_build`. Wrong numbers of elements or bytes become ValueErrors."""
    body: list[str] = []
    out: list[str] = []

    def part(kind: Any, name: str, size: int, label: str) -> None:
        if isinstance(kind, Layout):
            inner = [f"{name}_{i}" for i in range(len(kind._fields))]
            body.append(f"{''.join(n + ', ' for n in inner)} = {name}")
            for n, field in zip(inner, kind._fields, strict=True):
                part(field.kind, n, field.size, field.name)
        elif isinstance(kind, Array) and not isinstance(kind.element, Prim):
            inner = [f"{name}_{i}" for i in range(kind.length)]
            body.append(f"{''.join(n + ', ' for n in inner)} = {name}")
            for n in inner:
                part(kind.element, n, size // kind.length, label)
        elif isinstance(kind, Array):
            body.append(f"check_count({name}, {kind.length}, {label!r})")
            out.append(f"*{name}")
        else:
            if isinstance(kind, (Bytes, Union)):
                body.append(f"check_raw({name}, {size}, {isinstance(kind, Bytes)}, {label!r})")
            out.append(name)

    part(layout, "x", layout.size, layout.name)
    lines = "".join(f"    {line}\n" for line in body)
    names: dict[str, Any] = {"check_count": _check_count, "check_raw": _check_raw}
    exec(f"def spread(x):\n{lines}    return ({''.join(n + ', ' for n in out)})\n", names)
    made: Callable[[Any], tuple[Any, ...]] = names["spread"]
    return made


def _check_count(item: Any, length: int, name: str) -> None:
    if len(item) != length:
        raise ValueError(f"{name}: {length} elements needed, {len(item)} given")


def _check_raw(item: Any, size: int, exact: bool, name: str) -> None:
    """The struct module cuts and fills byte strings silently; here too long is an error, and too short is for
    anything but a union."""
    if len(item) > size or (exact and len(item) < size):
        raise ValueError(f"{name}: {size} bytes needed, {len(item)} given")


_cache: dict[tuple[type, bool], Layout[Any]] = {}


def _nested(record: type, packed: bool) -> Layout[Any]:
    key = (record, packed)
    if key not in _cache:
        _cache[key] = Layout(record, packed=packed)
    return _cache[key]


def _describe(hint: Any, packed: bool) -> tuple[Any, str, int, int]:
    """(kind, struct code, size, alignment) of one annotated field."""
    if _is_struct(hint):
        layout = _nested(hint, packed)
        return layout, layout.code, layout.size, layout.align
    if get_origin(hint) is not Annotated:
        raise TypeError(f"not an ABI type: {hint!r}")
    kind = get_args(hint)[1]
    if isinstance(kind, Prim):
        return kind, kind.code, kind.size, kind.size
    if isinstance(kind, Bytes):
        return kind, f"{kind.length}s", kind.length, 1
    if isinstance(kind, Union):
        members = [_describe(member, packed) for member in kind.members.values()]
        align = max(m[3] for m in members)
        size = max(m[2] for m in members)
        size += 0 if packed else -size % align
        return kind, f"{size}s", size, align
    if isinstance(kind, Array):
        element, code, size, align = _describe(kind.element, packed)
        return Array(element, kind.length), code * kind.length, size * kind.length, align
    raise TypeError(f"not an ABI type: {hint!r}")
