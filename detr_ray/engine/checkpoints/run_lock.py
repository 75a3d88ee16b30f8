"""Ensures that only one process at a time writes a run: by a file lock in a local folder, by claims elsewhere.

Object stores have no locks, and pyarrow has no conditional writes. So a process writes a claim, ``claims/TOKEN.json``,
waits until claims written at the same moment are visible, and reads all claims. The process that holds the run comes
first, then waiting processes, ordered by their tokens. Each process rewrites its claim regularly with a higher beat. A
claim whose beat does not change belongs to a dead process. It is removed after `STALE_S`, or at once if the process ran
on this machine and has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from detr_ray.addresses import join, local_path
from detr_ray.callbacks import Say
from detr_ray.config import ConfigError
from detr_ray.locations import delete_file, list_names, read_bytes, write_bytes
from detr_ray.retries import reason_of

logger = logging.getLogger(__name__)

SETTLE_S = 1.0
"""Least time after which a new claim is visible to all processes; longer if writing it took long."""
BEAT_S = 5.0
STALE_S = 30.0
"""The process of a claim that does not change for this time counts as dead."""
_LOOK_S = 0.5
_NAMING_S = 1.0


@contextlib.contextmanager
def held(path: str, name: str, say: Say = lambda line: None) -> Iterator[Callable[[], bool]]:
    """Locks a run, or a search, for this process.

    Args:
        path: the run's folder or URI; a local folder must exist.
        name: the run's name, for messages.
        say: shows the user a line.

    Yields:
        Whether another process has taken it over since, because this one was frozen for `STALE_S`. Then this process
        must not write any more. A folder on a disk cannot be taken over.

    Raises:
        ConfigError: another process has locked it.
        OSError: the storage fails.
    """
    folder = local_path(path)
    with _locked(folder, name) if folder is not None else claimed(path, name, "writing", say) as is_lost:
        yield is_lost


def _refusal(name: str, path: object, holder: str) -> ConfigError:
    return ConfigError(
        f"{name!r} in {path} is being written by {holder}; wait for it, stop it, or choose another name "
        "(run.name; tune.name of a search)"
    )


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[Callable[[], bool]]:
    """Holds the lock of a folder. The kernel releases it when the process ends, for whatever reason."""
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(name, folder, _holder_named_in(folder / ".lock")) from None
        file.truncate(0)
        file.write(_this_process())
        file.flush()
        try:
            yield lambda: False
        finally:
            file.truncate(0)


def _holder_named_in(lock: Path) -> str:
    """The process named in the lock file. Waits briefly, because a new holder may not have written it yet."""
    give_up = time.monotonic() + _NAMING_S
    while time.monotonic() < give_up:
        if found := lock.read_text().strip():
            return found
        time.sleep(0.02)
    return "another process"


State = Literal["waiting", "beginning", "writing", "ended"]
"""State of a claim's process. ``waiting``: for its turn; ``beginning``: creates the run's record, which is short;
``writing``: writes the run; ``ended`` (written before the claim is deleted, in case deleting is not permitted)."""


@dataclass(frozen=True)
class _Claim:
    """The content of a claim.

    Attributes:
        token: unique; of several waiting processes, the one with the smallest token is next.
        holder: process and machine, for messages.
        machine: boot and process namespace of its machine; empty if unknown.
        pid: its process id.
        born: its start time in clock ticks of the kernel.
        state: see `State`.
        beat: increases while the process lives.
    """

    token: str
    holder: str
    machine: str
    pid: int
    born: str
    state: State = "waiting"
    beat: int = 0

    @property
    def rank(self) -> tuple[bool, str]:
        """Sort key: processes that do not wait come first, then by token."""
        return self.state == "waiting", self.token

    def is_gone(self) -> bool | None:
        """Whether its process has ended; None if this cannot be found out from this machine."""
        if self.state == "ended":
            return True
        if not self.machine or self.machine != _machine():
            return None
        return _born(self.pid) != self.born


def _machine() -> str:
    """Identifies the boot of this machine and the namespace of process ids; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """Start time of a process of this machine; empty if there is none, or only a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


class _Claims:
    """The claims on one run, including the claim of this process.

    Attributes:
        own: the claim of this process, as last written.
    """

    def __init__(self, path: str) -> None:
        self._folder = join(path, "claims")
        self._passed_over: set[str] = set()
        self._writing = threading.Lock()
        self.own = _Claim(secrets.token_hex(8), _this_process(), _machine(), os.getpid(), _born(os.getpid()))

    def write_own(self, state: State) -> None:
        """Writes the own claim with a state and the next beat."""
        with self._writing:
            if self.own.state != "ended":
                self.own = replace(self.own, state=state, beat=self.own.beat + 1)
                self._write(self.own)

    def end(self) -> None:
        """Removes the own claim."""
        with self._writing:
            self.own = replace(self.own, state="ended")
        self.remove(self.own)

    def was_replaced(self) -> bool:
        """Whether another process has taken over the run, because this process was frozen and counted as dead.

        Then either the own claim was removed, or another claim has the state ``writing``. The second happens if this
        process was frozen just before a beat: when it continues, it writes its claim again.
        """
        found = self._read(self.own.token)
        if found is None or found.state == "ended":
            return True
        return self.own.state != "waiting" and any(other.state == "writing" for other in self._others())

    def remove(self, claim: _Claim) -> None:
        """Removes a claim, and ignores it from now on."""
        self._passed_over.add(claim.token)
        with contextlib.suppress(OSError):
            self._write(replace(claim, state="ended"))
            delete_file(self._location(claim.token))

    def first_before_own(self) -> _Claim | None:
        """The claim that comes first; None if it is the own claim."""
        first = min([self.own, *self._others()], key=lambda claim: claim.rank)
        return None if first is self.own else first

    def _others(self) -> list[_Claim]:
        """The claims of other processes. Removes the claims of processes that have ended."""
        names = [name.removesuffix(".json") for name in list_names(self._folder) if name.endswith(".json")]
        found = []
        for token in set(names) - self._passed_over - {self.own.token}:
            claim = self._read(token)
            if claim is not None and claim.is_gone():
                self.remove(claim)
            elif claim is not None:
                found.append(claim)
        return found

    def _location(self, token: str) -> str:
        return join(self._folder, f"{token}.json")

    def _write(self, claim: _Claim) -> None:
        write_bytes(self._location(claim.token), json.dumps(asdict(claim)).encode())

    def _read(self, token: str) -> _Claim | None:
        """Reads a claim; None if it does not exist or is not valid."""
        try:
            return _Claim(**json.loads(read_bytes(self._location(token))))
        except (FileNotFoundError, ValueError, TypeError):
            return None


@contextlib.contextmanager
def claimed(path: str, name: str, state: Literal["beginning", "writing"], say: Say) -> Iterator[Callable[[], bool]]:
    """Locks a run by a claim; see `held`.

    Args:
        path: the run's URI.
        name: the run's name, for messages.
        state: the state of the claim while the run is locked.
        say: shows the user a line.
    """
    claims, ended, lost = _Claims(path), threading.Event(), threading.Event()
    started = time.monotonic()
    claims.write_own("waiting")
    took_s = time.monotonic() - started
    beating = threading.Thread(target=_beat, args=(claims, ended, lost), name="run claim", daemon=True)
    beating.start()
    try:
        time.sleep(max(SETTLE_S, 5 * took_s))
        while True:
            _wait_for_turn(claims, path, name, say)
            claims.write_own(state)
            if claims.first_before_own() is None:
                break
            claims.write_own("waiting")  # another process took its turn before this claim was visible
        yield lost.is_set
    finally:
        ended.set()
        beating.join(BEAT_S)
        if not lost.is_set():
            claims.end()


def _wait_for_turn(claims: _Claims, path: str, name: str, say: Say) -> None:
    """Returns when no living process has a claim before the own one.

    Waits for processes that are waiting (they may be refused) or beginning (they are done soon).

    Raises:
        ConfigError: a living process is writing the run.
    """
    watched: _Claim | None = None
    give_up = 0.0
    while rival := claims.first_before_own():
        moved = watched is not None and watched.token == rival.token and watched != rival
        if rival.state == "writing" and (moved or rival.is_gone() is False):
            raise _refusal(name, path, rival.holder)
        if watched is None or watched != rival:
            if rival.state == "writing":
                say(f"{path} is claimed by {rival.holder}; looking for up to {STALE_S:.0f} s whether it is alive")
            watched, give_up = rival, time.monotonic() + STALE_S
        elif time.monotonic() > give_up:
            say(f"{rival.holder} has not moved for {STALE_S:.0f} s: going on without it")
            claims.remove(rival)
        time.sleep(_LOOK_S)


def _beat(claims: _Claims, ended: threading.Event, lost: threading.Event) -> None:
    """Rewrites the own claim regularly. Stops this process if its claim was removed while the process was frozen."""
    while not ended.wait(BEAT_S):
        try:
            if claims.was_replaced() and not ended.is_set():
                lost.set()
                logger.error("this process did not move for %.0f s, and another one goes on with its run", STALE_S)
                # A shell's background processes ignore SIGINT, unless something has set a handler.
                is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                os.kill(os.getpid(), signal.SIGTERM if is_ignored else signal.SIGINT)
                return
            claims.write_own(claims.own.state)
        except OSError as error:
            logger.warning("the claim on the run could not be renewed: %s", reason_of(error))
