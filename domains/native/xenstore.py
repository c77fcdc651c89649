"""A native domain's connection to xenstore: its ring page and event channel, as HVM parameters name them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from bus.abi.hvm.params import HVM_PARAM_STORE_EVTCHN, HVM_PARAM_STORE_PFN
from bus.addresses import Port
from domains.native.domain import NativeDomain
from drivers.xenbus import client as xs
from drivers.xenbus.ring import ClientRing

T = TypeVar("T")
TIMEOUT_S: Final = 10.0
"""Longest wait for xenstored's answer."""


class XenstoreClient:
    """Requests that wait for their reply; watches that call back. XenstoreError for what xenstored refuses."""

    def __init__(self, host: NativeDomain) -> None:
        """Connects through the ring that the domain builder made."""
        self._host = host
        self._ring = ClientRing(host.page(host.hvm_param(HVM_PARAM_STORE_PFN)))
        self._port = Port(host.hvm_param(HVM_PARAM_STORE_EVTCHN))
        self._client = xs.Client()
        self._watches: dict[str, Callable[[str], None]] = {}
        self._events: list[xs.WatchEvent] = []
        host.on_event(self._port, self._pump)

    def reconnect(self) -> None:
        """A process that takes the place of another: xenstored forgets the old one's watches, transactions and half requests."""
        if self._ring.ask_reconnect():
            self._host.notify(self._port)
            deadline = time.monotonic() + TIMEOUT_S
            while not self._ring.connected:
                if time.monotonic() > deadline:
                    raise TimeoutError("xenstored does not take the connection up again")
                self._host.reactor.once(0.1)
        self._client.reset()

    def _pump(self) -> None:
        """Move bytes both ways; watch events are called back from the reactor, never inside a request."""
        notify = False
        while True:
            got = self._ring.read()
            notify = notify or got.notify
            if got.data:
                self._events += self._client.feed(got.data)
            out = self._client.peek_output()
            sent = self._ring.write(out)
            if sent.moved:
                self._client.output_taken(sent.moved)
            notify = notify or sent.notify
            if not got.data and not sent.moved:
                break
        if notify:
            self._host.notify(self._port)
        if self._events:
            self._host.reactor.soon(self._call_back)

    def _call_back(self) -> None:
        events, self._events = self._events, []
        for event in events:
            callback = self._watches.get(event.token)
            if callback is not None:
                callback(event.path)

    def request(self, request: xs.Request) -> bytes:
        """One request's reply."""
        return self.run(xs.single(request))

    def run(self, procedure: xs.Procedure[T]) -> T:
        """The result of several requests (a transaction, a long directory)."""
        results: list[T] = []
        errors: list[xs.XenstoreError] = []
        self._client.start(procedure, results.append, errors.append)
        deadline = time.monotonic() + TIMEOUT_S
        self._pump()
        while not results and not errors:
            if time.monotonic() > deadline:
                raise TimeoutError("xenstored does not answer")
            self._host.reactor.once(0.2)
            self._pump()
        if errors:
            raise errors[0]
        return results[0]

    def read(self, path: str) -> bytes | None:
        """A node's value; None if there is no such node, or it may not be read."""
        try:
            return self.request(xs.read(path))
        except xs.XenstoreError as error:
            if error.name in ("ENOENT", "EACCES"):
                return None
            raise

    def write(self, path: str, value: str | bytes) -> None:
        """Write a node."""
        self.request(xs.write(path, value.encode() if isinstance(value, str) else value))

    def list(self, path: str) -> list[str]:
        """Names of a node's children; empty if there is none."""
        try:
            return self.run(xs.list_directory(path))
        except xs.XenstoreError as error:
            if error.name == "ENOENT":
                return []
            raise

    def watch(self, path: str, callback: Callable[[str], None]) -> str:
        """Call back with the path of each change at or below `path` (and once at first); the watch's token."""
        token = f"native-{len(self._watches)}-{time.monotonic_ns()}"
        self._watches[token] = callback
        self.request(xs.watch(path, token))
        return token

    def unwatch(self, path: str, token: str) -> None:
        """No more."""
        self._watches.pop(token, None)
        self.request(xs.unwatch(path, token))
