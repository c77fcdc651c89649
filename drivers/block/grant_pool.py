"""Persistent grants of one queue: frames that stay mapped, because the frontend uses them again and again.

Bounded; the least recently used idle one goes first. They are mapped with write access (blkif.h, note 8).
"""

from __future__ import annotations

from typing import Final, cast

from bus.abi.grant_table import GNTST_eagain, GNTST_okay
from drivers.block.ports import GrantMapper
from drivers.block.requests import Held, Request


class GrantPool:
    """Maps the segments of requests, in one hypercall for many, and lets go of them in one."""

    def __init__(self, mapper: GrantMapper, *, persistent: bool, limit: int) -> None:
        """`limit`: grants that may stay mapped while idle or in use."""
        self._mapper: Final = mapper
        self.persistent: Final = persistent
        self.limit: Final = limit
        self._held: dict[int, Held] = {}
        self._turn = 0

    @property
    def held(self) -> int:
        """Persistent grants mapped now."""
        return len(self._held)

    def map(self, requests: list[Request], write_to_frame: list[bool]) -> list[int]:
        """Give each request's `mapped` its (iova, length) list. `write_to_frame`: the device will write (a read). GNTST_okay each, or a
        negative GNTST_* for a request with a frame that could not be mapped, which holds nothing then; GNTST_eagain: it may be, later."""
        if not self.persistent:
            items = [
                (ref, writable)
                for request, writable in zip(requests, write_to_frame, strict=True)
                for ref, _, _ in request.segments
            ]
            iovas = self._mapper.map_frames(items)
            at, bad = 0, []
            statuses: list[int] = []
            for request in requests:
                segments = request.segments
                mine = iovas[at : at + len(segments)]
                at += len(segments)
                if min(mine) < 0:
                    bad += [iova for iova in mine if iova >= 0]
                    statuses.append(_worst(mine))
                    continue
                request.iovas = mine
                request.mapped = [
                    (iova + offset, length) for iova, (_, offset, length) in zip(mine, segments, strict=True)
                ]
                statuses.append(GNTST_okay)
            if bad:
                self._mapper.unmap_frames(bad)
            return statuses
        return self._map_persistent(requests)

    def _map_persistent(self, requests: list[Request]) -> list[int]:
        held = self._held
        self._turn += 1
        fresh = dict.fromkeys(
            [ref for request in requests for ref, _, _ in request.segments if ref not in held]
        )
        refused: dict[int, int] = {}
        loose: dict[int, int] = {}
        if fresh:
            wanted = {ref for request in requests for ref, _, _ in request.segments}
            over = len(held) + len(fresh) - self.limit
            if over > 0:
                idle = [ref for ref, entry in held.items() if not entry.users and ref not in wanted]
                idle.sort(key=lambda ref: held[ref].used)
                if idle[:over]:
                    self._mapper.unmap_frames([held.pop(ref).iova for ref in idle[:over]])
            for ref, iova in zip(fresh, self._mapper.map_frames([(ref, True) for ref in fresh]), strict=True):
                if iova < 0:
                    refused[ref] = iova
                elif len(held) < self.limit:
                    held[ref] = Held(iova)
                else:
                    loose[ref] = iova  # no room: for this batch's first user alone
        statuses: list[int] = []
        turn = self._turn
        owner: dict[int, Request] = {}
        for request in requests:
            entries = [*map(held.get, [ref for ref, _, _ in request.segments])]
            if None not in entries:  # nearly always
                grants = request.grants = cast("list[Held]", entries)
                for entry in grants:
                    entry.users += 1
                    entry.used = turn
                request.mapped = [
                    (entry.iova + offset, length)
                    for entry, (_, offset, length) in zip(grants, request.segments, strict=True)
                ]
                statuses.append(GNTST_okay)
                continue
            if found := [refused[ref] for ref, _, _ in request.segments if ref in refused]:
                statuses.append(_worst(found))
                continue
            mapped, status = [], GNTST_okay
            taken: list[Held] = []
            request.grants = taken
            for ref, offset, length in request.segments:
                there = held.get(ref)
                if there is not None:
                    there.users += 1
                    there.used = turn
                    taken.append(there)
                    mapped.append((there.iova + offset, length))
                    continue
                if owner.setdefault(ref, request) is not request:
                    # Another request of the batch owns that mapping and may end first: a mapping of its own.
                    iova = self._mapper.map_frames([(ref, True)])[0]
                    if iova < 0:
                        status = iova
                        break
                    request.iovas.append(iova)
                else:
                    iova = loose[ref]
                    if iova not in request.iovas:
                        request.iovas.append(iova)
                mapped.append((iova + offset, length))
            if len(mapped) < len(request.segments):
                self.release([request])
                statuses.append(status)
                continue
            request.mapped = mapped
            statuses.append(GNTST_okay)
        unused = [iova for ref, iova in loose.items() if ref not in owner]
        if unused:
            self._mapper.unmap_frames(unused)
        return statuses

    def release(self, requests: list[Request]) -> None:
        """They are done: unmap what is not persistent."""
        iovas: list[int] = []
        for request in requests:
            if request.iovas:
                iovas += request.iovas
                request.iovas = []
            for grant in request.grants:
                grant.users -= 1
            request.grants = ()
            request.mapped = None
        if iovas:
            self._mapper.unmap_frames(iovas)

    def close(self) -> None:
        """Unmap everything that is held. No request may be under way."""
        if self._held:
            self._mapper.unmap_frames([entry.iova for entry in self._held.values()])
            self._held.clear()


def _worst(statuses: list[int]) -> int:
    """What to say of a request: that it cannot be mapped, if that is so of any frame; else that it may be later."""
    return min((status for status in statuses if status < 0 and status != GNTST_eagain), default=GNTST_eagain)
