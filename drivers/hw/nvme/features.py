"""Features of the controller: values and what may be set (NVMe 1.4, section 5.21.1). Nothing is saved over a reset."""

from __future__ import annotations

from typing import Final

from drivers.hw.nvme.pages import TEMPERATURE_K, Identity
from drivers.hw.nvme.spec import Feature, Status

_CHANGEABLE: Final = 1 << 2
"""Supported capabilities (GET FEATURES, SEL 3): changeable; neither saveable nor of a namespace."""
NO_THRESHOLD: Final = 0xFFFF


class FeatureError(Exception):
    """The command fails with `status`."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


class Features:
    """Current values of one controller."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self.queues_asked = False
        self.reset()

    def reset(self) -> None:
        """Defaults, as after a controller reset."""
        self._values: dict[int, int] = {
            Feature.ARBITRATION: 7,  # no limit on the burst
            Feature.POWER_MANAGEMENT: 0,
            Feature.ERROR_RECOVERY: 0,
            Feature.VOLATILE_WRITE_CACHE: 1,
            Feature.NUMBER_OF_QUEUES: (self._identity.queues - 1) * 0x10001,
            Feature.INTERRUPT_COALESCING: 0,
            Feature.WRITE_ATOMICITY: 0,
            Feature.ASYNC_EVENT: 0,
        }
        self._no_coalescing: set[int] = {0}
        self._over = NO_THRESHOLD
        self._under = 0
        self.queues_asked = False

    @property
    def write_cache(self) -> bool:
        """Writes may be answered before they are on the disk."""
        return bool(self._values[Feature.VOLATILE_WRITE_CACHE])

    @property
    def async_events(self) -> int:
        """Asynchronous Event Configuration."""
        return self._values[Feature.ASYNC_EVENT]

    def coalescing(self, vector: int) -> tuple[int, int]:
        """(completions to gather, longest delay in ns) of a vector; (1, 0): none."""
        value = self._values[Feature.INTERRUPT_COALESCING]
        time = value >> 8 & 0xFF
        if vector in self._no_coalescing or not time:
            return 1, 0
        return (value & 0xFF) + 1, time * 100_000

    @property
    def too_hot(self) -> bool:
        """The temperature is beyond a threshold."""
        return self._over <= TEMPERATURE_K or self._under >= TEMPERATURE_K

    def get(self, fid: int, select: int, dw11: int) -> int:
        """DW0 of GET FEATURES. FeatureError."""
        known = fid in self._values or fid in (Feature.TEMPERATURE_THRESHOLD, Feature.INTERRUPT_VECTOR)
        if not known or select > 3:
            raise FeatureError(Status.INVALID_FIELD)
        if select == 3:
            return 0 if fid in (Feature.POWER_MANAGEMENT, Feature.WRITE_ATOMICITY) else _CHANGEABLE
        if fid == Feature.INTERRUPT_VECTOR:
            vector = self._vector(dw11)
            return vector | (1 << 16 if vector in self._no_coalescing else 0)
        if fid == Feature.TEMPERATURE_THRESHOLD:
            kind, sensor = dw11 >> 20 & 3, dw11 >> 16 & 0xF
            if sensor not in (0, 0xF) or kind > 1:
                raise FeatureError(Status.INVALID_FIELD)
            if select:
                return 0 if kind else NO_THRESHOLD
            return self._under if kind else self._over
        if select:
            return Features(self._identity)._values[fid]
        return self._values[fid]

    def _vector(self, dw11: int) -> int:
        vector = dw11 & 0xFFFF
        if vector >= self._identity.vectors:
            raise FeatureError(Status.INVALID_FIELD)
        return vector

    def set(self, fid: int, save: bool, dw11: int, io_queues: bool) -> int:
        """DW0 of SET FEATURES. `io_queues`: there are I/O queues already. FeatureError."""
        if fid not in Feature._value2member_map_:
            raise FeatureError(Status.INVALID_FIELD)
        if save:
            raise FeatureError(Status.FEATURE_NOT_SAVEABLE)
        if fid == Feature.NUMBER_OF_QUEUES:
            return self._set_queues(dw11, io_queues)
        if fid == Feature.INTERRUPT_VECTOR:
            vector = self._vector(dw11)
            if dw11 >> 16 & 1:
                self._no_coalescing.add(vector)
            else:
                self._no_coalescing.discard(vector)
        elif fid == Feature.TEMPERATURE_THRESHOLD:
            kind, sensor = dw11 >> 20 & 3, dw11 >> 16 & 0xF
            if sensor not in (0, 0xF) or kind > 1:
                raise FeatureError(Status.INVALID_FIELD)
            if kind:
                self._under = dw11 & 0xFFFF
            else:
                self._over = dw11 & 0xFFFF
        elif fid == Feature.POWER_MANAGEMENT:
            if dw11 & 0x1F:  # there is one power state
                raise FeatureError(Status.INVALID_FIELD)
        elif fid == Feature.VOLATILE_WRITE_CACHE or fid == Feature.WRITE_ATOMICITY:
            self._values[fid] = dw11 & 1
        elif fid == Feature.INTERRUPT_COALESCING:
            self._values[fid] = dw11 & 0xFFFF
        elif fid == Feature.ERROR_RECOVERY:
            if dw11 >> 16 & 1:  # errors for deallocated blocks: not supported
                raise FeatureError(Status.INVALID_FIELD)
            self._values[fid] = dw11 & 0xFFFF
        elif fid == Feature.ASYNC_EVENT:
            self._values[fid] = dw11 & 0x1F
        else:
            self._values[fid] = dw11
        return 0

    def _set_queues(self, dw11: int, io_queues: bool) -> int:
        if io_queues:
            raise FeatureError(Status.COMMAND_SEQUENCE)
        if dw11 & 0xFFFF == 0xFFFF or dw11 >> 16 == 0xFFFF:
            raise FeatureError(Status.INVALID_FIELD)
        return self._values[Feature.NUMBER_OF_QUEUES]
