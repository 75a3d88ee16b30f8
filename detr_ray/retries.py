"""Repeats storage operations after temporary errors, and turns storage errors into messages for users."""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

_JITTER = random.Random()  # not the global generator, whose numbers must not depend on storage errors

T = TypeVar("T")

_ACCESS = re.compile(
    r"ACCESS_DENIED|HTTP status 40[13]\b|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN"
    r"|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|PERMISSION_DENIED|UNAUTHENTICATED|AuthenticationFailed|AuthorizationFailure"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '.*' not found")
_NO_OBJECT = re.compile(r"NO_SUCH_KEY|HTTP status 404\b")
_HOPELESS = re.compile(r"HTTP status (301|307|405|416)\b|PERMANENT_REDIRECT|INVALID_BUCKET_NAME|NotImplemented")
_NOISE = re.compile(r"^When .*?: (?=AWS Error)| \(Request ID: [^)]*\)|\. Detail: .*$", re.DOTALL)
_OF_DISK = re.compile(r"\. Detail: \[errno \d+\] ([^.\n]+)")
"""Where pyarrow writes why a disk failed: the words before it say only what was tried."""

_PASSING_ON_DISK = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN})
"""Temporary errors of network disks. All other errors of disks (disk full, no such file) are lasting."""
_STAYING = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC})

_IN_THE_WAY = frozenset({errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG})


class StorageError(OSError):
    """A storage operation failed, and repeating it does not help; the text is "location: reason"."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class NoSuchObject(StorageError, FileNotFoundError):  # noqa: N818 - the name says what it is
    """There is no file or object at a location."""


class AccessDenied(StorageError, PermissionError):  # noqa: N818
    """The storage denies access."""


@dataclass(frozen=True)
class Patience:
    """How often a failed operation is tried again.

    Attributes:
        attempts: largest number of attempts.
        first_pause_s: pause before the second attempt; pauses double, and each is shortened by a random part.
        longest_pause_s: limit of the pauses.
        give_up_after_s: no attempt starts later than this after the start of the first.
    """

    attempts: int = 5
    first_pause_s: float = 0.25
    longest_pause_s: float = 8.0
    give_up_after_s: float = 120.0


PATIENT = Patience()


def patiently(location: str, operation: Callable[[], T], *, remote: bool, patience: Patience = PATIENT) -> T:
    """Calls an operation, and repeats it after temporary errors.

    Args:
        location: the location of the operation, for messages.
        operation: may be called any number of times.
        remote: whether the location is remote. There, all errors count as temporary except known lasting ones.
        patience: limits of repetition.

    Returns:
        What ``operation`` returned.

    Raises:
        NoSuchObject: there is nothing at the location; not repeated.
        AccessDenied: access is not permitted; not repeated.
        StorageError: another lasting error, or a temporary error that remained when the limits were reached.
        OSError: a lasting error of a local disk, unchanged.
    """
    started = time.monotonic()
    pause_s = patience.first_pause_s
    attempt = 1
    while True:
        try:
            return operation()
        except StorageError:
            raise
        except OSError as error:
            lasting = _lasting(error, location, remote)
            if lasting is error:
                raise
            if lasting is not None:
                raise lasting from error
            elapsed_s = time.monotonic() - started
            if attempt >= patience.attempts or elapsed_s + pause_s > patience.give_up_after_s:
                times = "1 attempt" if attempt == 1 else f"{attempt} attempts"
                reason = f"gave up after {times} in {elapsed_s:.1f} s; the last error: {reason_of(error)}"
                raise StorageError(errno.EIO, reason, location) from error
            logger.info("%s: attempt %d of %d: %s", location, attempt, patience.attempts, reason_of(error))
        # The random part spreads the next attempts of tasks that failed at the same time.
        time.sleep(pause_s * _JITTER.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, patience.longest_pause_s)
        attempt += 1


def may_pass(error: OSError) -> bool:
    """Whether a failed operation may succeed minutes later.

    True for example for an outage, a full disk and expired credentials; false for a file where a folder must be.
    """
    return error.errno not in _IN_THE_WAY and not isinstance(error, NoSuchObject)


def reason_of(error: BaseException) -> str:
    """The reason of an error in one line, without locations and request ids that storage libraries add."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    of_disk = _OF_DISK.search(text)
    if of_disk is not None and "AWS Error" not in text:
        return of_disk[1].strip()
    return _NOISE.sub("", text.strip().split("\n")[0]).rstrip(" :.")


def _lasting(error: OSError, location: str, remote: bool) -> OSError | None:
    """The error to raise if it is lasting; None if it may be temporary."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return NoSuchObject(errno.ENOENT, "no such object" if remote else "no such file", location)
    if not remote:
        return None if error.errno in _PASSING_ON_DISK else error
    if _NO_BUCKET.search(text):
        return NoSuchObject(errno.ENOENT, "no such bucket (buckets are not made here)", location)
    if _NO_OBJECT.search(text):
        return NoSuchObject(errno.ENOENT, "no such object", location)
    if isinstance(error, PermissionError) or _ACCESS.search(text):
        reason = f"access denied ({reason_of(error)}); the credentials are those of the environment"
        return AccessDenied(errno.EACCES, reason, location)
    if error.errno in _STAYING or _HOPELESS.search(text):
        return StorageError(error.errno or errno.EIO, reason_of(error), location)
    return None
