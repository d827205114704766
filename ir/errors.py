"""Every error that a user can meet, with the exit code that the command line gives it.

The message is one line: it names the field, tensor, option or line at fault and says
what would work. Anything that is not a PsigraphError is a defect of psigraph.
"""

from __future__ import annotations


class PsigraphError(Exception):
    """Base of all errors that are shown to a user as one line."""

    exit_code = 1


class UsageError(PsigraphError):
    """Options or arguments that cannot work as given."""

    exit_code = 2


class ModelFileError(PsigraphError):
    """A model file that is truncated, hostile or inconsistent.

    field: the key, tensor or header part at fault; offset: byte offset in the file, or None.
    """

    exit_code = 3

    def __init__(self, message: str, field: str = "", offset: int | None = None) -> None:
        where = f" (byte {offset})" if offset is not None else ""
        super().__init__(f"{field}: {message}{where}" if field else f"{message}{where}")
        self.field = field
        self.offset = offset


class UnsupportedModelError(PsigraphError):
    """A sound file that psigraph has no kernels or no spec for."""

    exit_code = 4


class PolicyRefusal(PsigraphError):
    """The policy forbids this artifact or this request."""

    exit_code = 5


class SpecError(PsigraphError):
    """A model spec (YAML) or IR text that is wrong; the message carries file and line."""

    exit_code = 6


class DeviceError(PsigraphError):
    """No usable GPU or driver, or a driver call that failed."""

    exit_code = 7


class OutOfMemoryError(DeviceError):
    """Not enough device memory: the message says how much was needed and free, and what to lower."""

    exit_code = 8


class CompileError(PsigraphError):
    """A kernel text that its compiler refuses."""

    exit_code = 9


class OutputError(PsigraphError):
    """A result that cannot be written."""

    exit_code = 10
