"""The effects that wait for the shell, and the orders whose answers are still outstanding."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bus.addresses import DomId, Mfn
from hypervisor.core.effects import Effect, Log, Order

Done = Callable[[int, int, bytes], None]
"""(now_ns, rc, data): the process answered. `rc` and `data` come from a process that is not trusted."""
Failed = Callable[[int, str], None]
"""(now_ns, why): no answer will come: "expired", "dead" or "refused" (too many outstanding)."""


MAX_STALE_FRAMES = 1024
"""Of one `drop_code` order."""


@dataclass(slots=True)
class _Pending:
    domain: DomId
    kind: str
    deadline: int
    done: Done
    failed: Failed


class Outbox:
    """Collects effects in order; knows the pending orders, their deadlines and what follows from them."""

    def __init__(self, max_orders: int) -> None:
        self._effects: list[Effect] = []
        self._pending: dict[int, _Pending] = {}
        self._count: dict[DomId, int] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._next_id = 1
        self._max_orders = max_orders
        self._stale: dict[DomId, list[int]] = {}
        self._stale_runs: dict[DomId, list[tuple[int, int]]] = {}
        self.stale_now: Callable[[DomId, Sequence[tuple[int, int]]], None] | None = None
        """The shell's: tells a domain's process at once of stale frames, (first, count) each. None: the order `drop_code` does, in its
        turn."""

    def emit(self, effect: Effect) -> None:
        """Append one effect."""
        self._effects.append(effect)

    def take(self) -> list[Effect]:
        """All effects since the last call, in order."""
        self.tell_stale()
        effects, self._effects = self._effects, []
        if effects:  # an order about stale code is one
            self._stale.clear()
        return effects

    def code_is_stale(self, domain: DomId, mfn: Mfn, count: int = 1) -> None:
        """Somebody wrote to the frame, and so many from it on. The order `drop_code` names frames of one step of the core together, at the
        place of the first: nothing leaves before the step is over, and by then all of them are written. Where the shell has another way
        (`stale_now`), they are told by `tell_stale`, and no later than the step's effects."""
        if self.stale_now is not None:
            runs = self._stale_runs.setdefault(domain, [])
            first, length = runs[-1] if runs else (0, 0)
            if length and first <= mfn <= first + length:  # behind the last run, or in it
                runs[-1] = (first, max(length, mfn + count - first))
            else:
                runs.append((mfn, count))
            return
        for frame in range(mfn, mfn + count):
            frames = self._stale.get(domain)
            if frames is None or len(frames) >= MAX_STALE_FRAMES:
                frames = self._stale[domain] = []
                self.tell(domain, "drop_code", {"frames": frames})
            if not frames or frames[-1] != frame:
                frames.append(frame)

    def tell_stale(self) -> None:
        """What `code_is_stale` collected is told at once, where the shell has a way for that (`stale_now`): before the next byte is written
        that says to anybody that those frames were. A domain that polls its memory learns of it in no other order."""
        if self._stale_runs and self.stale_now is not None:
            for domain, runs in self._stale_runs.items():
                self.stale_now(domain, runs)
            self._stale_runs.clear()

    def log(self, level: str, text: str, domain: DomId | None = None) -> None:
        """A line for the hypervisor's log."""
        self.emit(Log(level, text, domain))

    def tell(
        self,
        domain: DomId,
        kind: str,
        body: dict[str, object] | None = None,
        *,
        extents: tuple[Mfn, ...] = (),
    ) -> None:
        """An order that needs no answer."""
        self.emit(Order(domain, 0, kind, body or {}, timeout_ns=0, extents=extents))

    def ask(
        self,
        now: int,
        domain: DomId,
        kind: str,
        body: dict[str, object],
        done: Done,
        failed: Failed,
        *,
        timeout_ns: int,
        windows: tuple[tuple[int, bool], ...] = (),
        extents: tuple[Mfn, ...] = (),
    ) -> int:
        """An order whose outcome matters: exactly one of `done` and `failed` is called later. Returns its id.

        A domain with too many outstanding orders gets no more: `failed(now, "refused")` is called at once (id
        0)."""
        if self._count.get(domain, 0) >= self._max_orders:
            failed(now, "refused")
            return 0
        order_id = self._next_id
        self._next_id += 1
        self._pending[order_id] = _Pending(domain, kind, now + timeout_ns, done, failed)
        self._count[domain] = self._count.get(domain, 0) + 1
        heapq.heappush(self._deadlines, (now + timeout_ns, order_id))
        self.emit(Order(domain, order_id, kind, body, windows, timeout_ns, extents))
        return order_id

    def _pop(self, order_id: int) -> _Pending | None:
        pending = self._pending.pop(order_id, None)
        if pending is not None:
            left = self._count[pending.domain] - 1
            if left:
                self._count[pending.domain] = left
            else:
                del self._count[pending.domain]
        return pending

    def done(self, now: int, domain: DomId, order_id: int, rc: int, data: bytes) -> bool:
        """The domain's process answered. False (and nothing happens) if it has no such order outstanding."""
        pending = self._pending.get(order_id)
        if pending is None or pending.domain != domain:
            return False
        self._pop(order_id)
        pending.done(now, rc, data)
        return True

    def expired(self, now: int, order_id: int) -> None:
        """The order's time is over; nothing happens if it was answered."""
        pending = self._pop(order_id)
        if pending is not None:
            self.log("warning", f"order {pending.kind} was not answered in time", pending.domain)
            pending.failed(now, "expired")

    def domain_gone(self, now: int, domain: DomId) -> None:
        """No answer will come from this domain: all its orders fail now."""
        for order_id in [i for i, p in self._pending.items() if p.domain == domain]:
            pending = self._pop(order_id)
            if pending is not None:
                pending.failed(now, "dead")

    def tick(self, now: int) -> None:
        """Expire what is due."""
        while self._deadlines and self._deadlines[0][0] <= now:
            self.expired(now, heapq.heappop(self._deadlines)[1])

    def next_deadline(self) -> int | None:
        """When `tick` next has something to do."""
        while self._deadlines and self._deadlines[0][1] not in self._pending:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def outstanding(self, domain: DomId) -> int:
        """How many of the domain's orders are unanswered."""
        return self._count.get(domain, 0)
