"""Errors a user can act on, each with the exit code that the README documents.

Everything raised on purpose is a `UserError`; its message names the file, the line or field, the reason, and what to do.
Any other exception is a bug (exit code 70).
"""

from __future__ import annotations

import errno
import os

BUG = 70


class UserError(Exception):
    """A failure whose message is all the user needs; the command line shows no traceback for it."""

    exit_code = BUG


class DataError(UserError):
    """Bad data or non-finite numerics (sysexits EX_DATAERR)."""

    exit_code = 65


class StorageError(UserError):
    """Reading or writing failed: disk full, no permission, missing parent (sysexits EX_IOERR)."""

    exit_code = 74


class Interrupted(UserError):
    """Stopped by a signal; running the same command again resumes (sysexits EX_TEMPFAIL)."""

    exit_code = 75


class RecipeError(UserError):
    """The recipe, a name in it or a command-line argument is wrong (sysexits EX_CONFIG)."""

    exit_code = 78


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def from_os_error(error: OSError) -> StorageError:
    """Say which path failed and what to do about it."""
    where = error.filename or "a file"
    if error.errno in _DISK_FULL:
        return StorageError(f"{where}: no space left on the disk. Free some and run the same command again; finished stages are kept.")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StorageError(f"{where}: {reason}. Check the path and its permissions, then run the same command again.")


_BY_CODE = {kind.exit_code: kind for kind in (DataError, StorageError, Interrupted, RecipeError)}


def from_exit_code(code: int, message: str) -> UserError:
    """Rebuild the error that a child process reported by its documented exit code."""
    return _BY_CODE.get(code, UserError)(message)
