"""What the command tells its user: one line, and an exit status. No imports: the command must start fast."""

from __future__ import annotations

from typing import Final

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
"""The guest crashed, or the machine could not do what was asked."""
EXIT_USAGE: Final = 2
"""Bad input: an option, a file, a configuration."""
EXIT_TIMEOUT: Final = 124
EXIT_INTERRUPTED: Final = 130


class MachineError(Exception):
    """Told to the user in one line that names the thing and the mend; `code` is the exit status."""

    def __init__(self, text: str, code: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.code = code


class MachineGone(MachineError):
    """The machine went down."""


class InputError(MachineError):
    """What the user gave cannot be used."""

    def __init__(self, text: str) -> None:
        super().__init__(text, EXIT_USAGE)


class TimedOut(MachineError):
    """What was waited for did not come in time."""

    def __init__(self, text: str) -> None:
        super().__init__(text, EXIT_TIMEOUT)
