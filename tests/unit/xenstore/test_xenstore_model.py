"""The store against a simple model: dictionaries that are copied whole for each transaction."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus.abi.io import xs_wire as xs
from domains.dom0.xenstore.core import Core
from tests.unit.xenstore.helper_xenstore import Peer, Refused

Tree = dict[str, bytes]
NAMES = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)
SLOTS = st.integers(0, 3)


def model_write(tree: Tree, path: str, value: bytes | None) -> None:
    parts = path.split("/")
    for end in range(2, len(parts)):
        tree.setdefault("/".join(parts[:end]), b"")
    if value is None:
        tree.setdefault(path, b"")
    else:
        tree[path] = value


def model_rm(tree: Tree, path: str) -> str | None:
    parent = path.rpartition("/")[0]
    if parent and parent not in tree:
        return "ENOENT"
    for name in [name for name in tree if name == path or name.startswith(path + "/")]:
        del tree[name]
    return None


def model_read(tree: Tree, path: str) -> object:
    if path not in tree:
        return "ENOENT"
    below = {name[len(path) + 1 :] for name in tree if name.startswith(path + "/")}
    return tree[path], sorted(name for name in below if "/" not in name)


class Open:
    """A transaction of the model: the whole tree as it was and as the transaction sees it."""

    def __init__(self, ident: int, tree: Tree) -> None:
        self.ident = ident
        self.tree = dict(tree)
        self.stale = False
        """Something was committed since: the real one may say EAGAIN (if it touched the same), or go through."""
        self.log: list[tuple[Callable[[Tree], object], object]] = []
        """What it did, as a step on a tree, and what it was answered."""


class StoreMachine(RuleBasedStateMachine):
    """Work in the tree and in up to four transactions at once. Transactions are serializable: one that commits was answered
    and has done exactly what it would have been, and done, had it run alone at the moment of its commit.
    """

    @initialize()
    def begin(self) -> None:
        self.core = Core()
        self.peer = Peer(self.core, 1, 0)
        self.tree: Tree = {"/tool": b"", "/tool/xenstored": b""}
        self.open: dict[int, Open] = {}

    def step(self, slot: int, act: Callable[[int], object], model: Callable[[Tree], object]) -> None:
        """Do the same to the core and to the model, in the slot's transaction, or outside if none is open there."""
        entry = self.open.get(slot)
        try:
            got = act(0 if entry is None else entry.ident)
        except Refused as refused:
            got = str(refused)
        if entry is None:
            before = dict(self.tree)
            assert got == model(self.tree)
            if self.tree != before:
                self.others_stale()
            return
        entry.log.append((model, got))
        expected = model(entry.tree)
        if not entry.stale:
            assert got == expected

    def others_stale(self) -> None:
        for other in self.open.values():
            other.stale = True

    @rule(slot=SLOTS, path=NAMES, value=st.binary(max_size=8))
    def write(self, slot: int, path: str, value: bytes) -> None:
        self.step(
            slot, lambda tx: self.peer.write(path, value, tx), lambda tree: model_write(tree, path, value)
        )

    @rule(slot=SLOTS, path=NAMES)
    def mkdir(self, slot: int, path: str) -> None:
        self.step(slot, lambda tx: self.peer.mkdir(path, tx), lambda tree: model_write(tree, path, None))

    @rule(slot=SLOTS, path=NAMES)
    def remove(self, slot: int, path: str) -> None:
        self.step(slot, lambda tx: self.peer.rm(path, tx), lambda tree: model_rm(tree, path))

    @rule(slot=SLOTS, path=NAMES)
    def look(self, slot: int, path: str) -> None:
        self.step(
            slot,
            lambda tx: (self.peer.read(path, tx), sorted(self.peer.ls(path, tx))),
            lambda tree: model_read(tree, path),
        )

    @rule(slot=SLOTS)
    def start(self, slot: int) -> None:
        if slot not in self.open:
            self.open[slot] = Open(self.peer.start(), self.tree)

    @rule(slot=SLOTS, commit=st.booleans())
    def end(self, slot: int, commit: bool) -> None:
        entry = self.open.pop(slot, None)
        if entry is None:
            return
        error = self.peer.error(xs.XS_TRANSACTION_END, b"T\0" if commit else b"F\0", entry.ident)
        if error:
            assert (error, commit) == ("EAGAIN", True)
            assert entry.stale, "a conflict needs somebody to conflict with"
            return
        if not commit:
            return
        before = dict(self.tree)
        for model, answer in entry.log:
            assert answer == model(self.tree)
        if self.tree != before:
            self.others_stale()

    @invariant()
    def tree_is_the_models(self) -> None:
        if hasattr(self, "core"):
            nodes = self.core.store.nodes
            assert {path.decode(): node.value for path, node in nodes.items() if path != b"/"} == self.tree
            assert self.core.store.check() == []
            assert self.core.open_transactions == len(self.open)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
