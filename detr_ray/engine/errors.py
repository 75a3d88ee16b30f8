"""The errors of a run."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that should be there is damaged or unreadable; the message names its files."""


class RunFailed(RuntimeError):  # noqa: N818 - it names what happened to the run
    """The run cannot go on, and starting it again would end the same way.

    The message is for the user: it names the file, the key or the image, and says what to do. It is shown without a
    traceback.

    Attributes:
        agreed: whether every worker raises the same error at the same step, so that no worker waits for another.
    """

    def __init__(self, message: str, *, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed
