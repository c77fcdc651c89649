"""The state of a graph of objects, kept and put back: a machine that is built once serves each input of a fuzzer, and each seed of the
simulation, as if it were new.

Put back in place, so that closures, bound methods and whoever else holds the objects see it. What an input made is dropped; what it
changed is as before. Classes, functions' code and modules are taken for constant."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import inspect
import itertools
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

CONSTANT: Final = (
    type(None), bool, int, float, str, bytes, complex, type, types.ModuleType, types.CodeType, types.BuiltinFunctionType, enum.Enum, range,
    property, types.GenericAlias,
)  # fmt: skip
COUNTERS: Final = (itertools.count,)
FRESH: Final = (itertools.count, memoryview)
"""What is put back as a copy: a counter counts on, and a view may be released."""
Restore = Callable[[], None]


def _copy(one: Any) -> Any:
    return one[:] if isinstance(one, memoryview) else copy.copy(one)


def _slots(kind: type) -> list[str]:
    names: list[str] = []
    for each in kind.__mro__:
        slots = each.__dict__.get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _setter(kind: type, name: str) -> Any:
    """Of the slot, whatever __setattr__ says."""
    if name.startswith("__") and not name.endswith("__"):
        raise TypeError(f"{kind}: a slot with a private name")
    return inspect.getattr_static(kind, name).__set__


class Snapshot:
    """Of everything that `roots` lead to, at this moment. TypeError for an object of a kind whose state it does not know."""

    def __init__(
        self, *roots: object, constant: tuple[type, ...] = (), elsewhere: tuple[object, ...] = ()
    ) -> None:
        """`constant`: types whose objects never change. `elsewhere`: objects that somebody else puts back."""
        self._constant: Final = (*CONSTANT, *constant)
        self._actions: list[Restore] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self.objects = 0
        seen: dict[int, object] = {id(one): one for one in elsewhere}
        waiting = list(roots)
        while waiting:
            one = waiting.pop()
            if isinstance(one, self._constant) or id(one) in seen:
                continue
            seen[id(one)] = one
            waiting += self._visit(one)
        self.objects = len(seen)
        self._seen: Final = seen  # by identity: none of them may be freed

    def restore(self) -> None:
        """As it was."""
        for one, kept in self._dicts:
            if one or kept:
                one.clear()
                one.update(kept)
        for action in self._actions:
            action()

    # ------------------------------------------------------------------ kinds of objects

    def _visit(self, one: Any) -> Iterator[object]:
        if isinstance(one, dict):
            yield from self._dict(one)
        elif isinstance(one, list | deque):
            yield from self._sequence(one)
        elif isinstance(one, set):
            self._set(one)
            yield from one
        elif isinstance(one, tuple | frozenset):
            yield from one
        elif isinstance(one, bytearray | array):
            self._buffer(one)
        elif isinstance(one, memoryview):
            yield one.obj  # its holder puts a copy back
        elif isinstance(one, types.MethodType):
            yield one.__self__
            yield one.__func__
        elif isinstance(one, types.FunctionType):
            yield from one.__closure__ or ()
            yield from one.__defaults__ or ()
        elif isinstance(one, types.CellType):
            yield from self._cell(one)
        elif isinstance(one, functools.partial):
            yield one.func
            yield from one.args
            yield from one.keywords.values()
        elif isinstance(one, types.MethodWrapperType):
            yield one.__self__
        elif isinstance(one, COUNTERS):
            pass  # its holder puts a copy back
        elif isinstance(one, types.GeneratorType | types.CoroutineType | Iterator):
            raise TypeError(f"a {type(one).__name__}: how far it is cannot be kept")
        if type(one).__module__ != "builtins" and not isinstance(one, types.FunctionType | functools.partial):
            yield from self._attributes(one)

    def _dict(self, one: dict[Any, Any]) -> Iterator[object]:
        kept = dict(one)
        fresh = {key: _copy(value) for key, value in kept.items() if isinstance(value, FRESH)}
        kept.update(fresh)
        self._dicts.append((one, kept))
        if fresh:

            def restore() -> None:
                for key, value in fresh.items():
                    one[key] = _copy(value)

            self._actions.append(restore)
        yield from kept.keys()
        yield from kept.values()

    def _sequence(self, one: Any) -> Iterator[object]:
        kept = list(one)
        fresh = {at: _copy(value) for at, value in enumerate(kept) if isinstance(value, FRESH)}

        def restore() -> None:
            one.clear()
            one.extend(kept)
            for at, value in fresh.items():
                one[at] = _copy(value)

        self._actions.append(restore)
        yield from kept

    def _set(self, one: set[Any]) -> None:
        kept = frozenset(one)

        def restore() -> None:
            one.clear()
            one.update(kept)

        self._actions.append(restore)

    def _buffer(self, one: Any) -> None:
        kept = bytes(one)
        if isinstance(one, bytearray):

            def restore() -> None:
                if len(one) == len(kept):
                    one[:] = kept
                else:
                    one.clear()
                    one.extend(kept)

        else:

            def restore() -> None:
                if len(one) * one.itemsize == len(kept):
                    memoryview(one).cast("B")[:] = kept
                else:
                    del one[:]
                    one.frombytes(kept)

        self._actions.append(restore)

    def _cell(self, one: types.CellType) -> Iterator[object]:
        try:
            kept = one.cell_contents
        except ValueError:
            return  # empty
        if isinstance(kept, FRESH):
            raise TypeError(f"a {type(kept).__name__} in a closure")

        def restore() -> None:
            one.cell_contents = kept

        self._actions.append(restore)
        yield kept

    def _attributes(self, one: Any) -> Iterator[object]:
        parameters = getattr(type(one), "__dataclass_params__", None)
        frozen = dataclasses.is_dataclass(one) and parameters is not None and parameters.frozen
        attributes = getattr(one, "__dict__", None)
        if attributes:
            if frozen:
                yield from attributes.values()
            else:
                yield attributes
        names = [name for name in _slots(type(one)) if hasattr(one, name)]
        if names and not isinstance(one, tuple):
            values = [getattr(one, name) for name in names]
            if not frozen:
                missing = [name for name in _slots(type(one)) if not hasattr(one, name)]
                puts = [(_setter(type(one), name), value) for name, value in zip(names, values, strict=True)]
                fresh = [(put, _copy(value)) for put, value in puts if isinstance(value, FRESH)]
                kept = [pair for pair in puts if not isinstance(pair[1], FRESH)]
                self._actions.append(functools.partial(_put_back, one, kept, fresh, missing))
            yield from values


def _put_back(
    one: object, kept: list[tuple[Any, Any]], fresh: list[tuple[Any, Any]], missing: list[str]
) -> None:
    for put, value in kept:
        put(one, value)
    for put, value in fresh:
        put(one, _copy(value))
    for name in missing:
        if hasattr(one, name):
            object.__delattr__(one, name)
