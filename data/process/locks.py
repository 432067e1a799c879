"""One writer, on any file system: a lock is a file that names its owner, kept alive by a heartbeat.

Locks of the system (flock) are absent on some parallel file systems, seen by one node only on
others, and survive a dead node on NFS. This one needs nothing but that a file can be created once
(O_EXCL). An owner on this host is alive while its process is. One elsewhere is alive while its file
changes, as seen on the monotonic clock of whoever looks: clocks of two hosts are never compared.
What is dead is taken over. An owner whose file has gone, or is another's, ends at once, so that two
never write. A lock belongs to the directory that it was made in: in a copy, it holds nothing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

log = logging.getLogger("trainer")

BEAT_S = 5.0
STALE_S = 45.0  # without a heartbeat; metadata of a busy parallel file system may be seen half a minute late
EXIT_ROBBED = 71
CREATE_ONCE = os.O_CREAT | os.O_EXCL | os.O_WRONLY


class Busy(Exception):
    """Somebody else holds the lock; the message says who."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock; the same process with the same token is the same owner."""

    host: str
    process: int
    started: str  # ticks since boot, of the process: numbers of processes are used again
    system: str  # boot and process namespace: where `process` means anything
    token: str
    place: str = ""  # device and number of the directory, where `system` is the same

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def hold(path: Path, patience_s: float = 2 * STALE_S, vital: bool = True) -> Held:
    """Become the owner of `path`, which is created; wait for an owner on another host that may be dead.

    Args:
        vital: the process ends when it loses the lock; else it only stops to hold it.

    Raises:
        Busy: its owner is alive.
        OSError: the directory cannot be written.
    """
    owner = _myself(path)
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            descriptor = os.open(path, CREATE_ONCE, 0o644)
        except FileExistsError:
            content = _text(path)
            alive = None if content is None else _is_alive(path, content)
            if alive is None and time.monotonic() < deadline:
                if content is not None and not told:
                    told = True
                    waiting = "waiting up to %.0f s for %s, which may be dead, to let go of %s"
                    log.info(waiting, STALE_S, _who(content), path)
                time.sleep(0.1 if content is None else min(1.0, STALE_S / 10))
            elif alive is False and content is not None:
                _take_away(path, content)
            else:
                raise Busy(_who(content)) from None
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(owner)))
        return Held(path, owner, vital)


def holder(path: Path) -> str | None:
    """Who holds `path`, unless it is known to be dead; only looks, and needs no right to write.

    An owner on another host is known to be dead once its file was seen unchanged for STALE_S.
    """
    content = _text(path)
    return None if content is None or _is_alive(path, content) is False else _who(content)


_HELD: set[Held] = set()
_SEEN: dict[Path, tuple[str, float]] = {}  # how a file looked, and since when


def let_go() -> None:
    """Close every lock of this process, which is about to end without unwinding."""
    for held in list(_HELD):
        held.close()


def require_held() -> None:
    """End this process if it has lost a lock that is vital; for whoever is about to write."""
    for held in list(_HELD):
        held.require()


class Held:
    """A lock of this process, until `close`; its heartbeat is a thread."""

    def __init__(self, path: Path, owner: Owner, vital: bool) -> None:
        self.path, self.owner, self._vital = path, owner, vital
        _HELD.add(self)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock {path.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        _HELD.discard(self)
        self._thread.join()
        try:
            if self._is_mine():
                self.path.unlink()
        except OSError as error:  # the directory has gone, or its file system: nobody can be kept out any more
            log.debug("lock %s is left: %s", self.path, error)

    def require(self) -> None:
        """End this process if a vital lock is no longer its own.

        Raises:
            OSError: the file system does not answer.
        """
        if not self._vital or self._is_mine() or self._closed.is_set():
            return
        told = (
            f"{self.path} is no longer that of {self.owner}: its directory was moved or removed, "
            "or another process took over while this one stood still. Ending at once, so that two "
            "never write."
        )
        try:
            print(told, file=sys.stderr, flush=True)
        finally:  # also where the terminal has gone
            os._exit(EXIT_ROBBED)

    def _is_mine(self) -> bool:
        content = _text(self.path)
        return content is not None and _parse(content) == self.owner

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                self.require()
                os.utime(self.path)
            except FileNotFoundError:
                continue
            except OSError as error:  # a server that is away for a moment; the next beat tries again
                log.debug("lock %s: %s", self.path, error)


def _take_away(path: Path, content: str) -> None:
    """Remove exactly the file that was judged dead; one process at a time, or a new owner's goes."""
    guard = path.with_name(path.name + ".takeover")
    try:
        os.close(os.open(guard, CREATE_ONCE, 0o644))
    except FileExistsError:
        time.sleep(0.1)
        if _unchanged(guard, "")[0] > STALE_S:  # of one who died in between
            guard.unlink(missing_ok=True)
        return
    try:
        if _text(path) == content:
            path.unlink()
            told = "WARNING: %s was left by %s, which is dead or holds another directory: taken over"
            log.info(told, path, _who(content))
    except FileNotFoundError:
        return
    finally:
        guard.unlink(missing_ok=True)


def _is_alive(path: Path, content: str) -> bool | None:
    """None where only the heartbeat can tell, and has not been watched for long enough."""
    owner = _parse(content)
    if owner is None or owner.system != _system():
        seconds, changed = _unchanged(path, content)
        if seconds > STALE_S:
            return False
        return True if changed else None
    if owner.place and owner.place != _place(path):  # a copy of the lock of another directory
        return False
    started = _started(owner.process)
    if started is None:
        try:
            os.kill(owner.process, 0)
        except PermissionError:  # somebody else's, whose /proc is hidden from us
            return True
        except ProcessLookupError:
            return False
    return started == owner.started


def _unchanged(path: Path, content: str) -> tuple[float, bool]:
    """Seconds for which this process has seen a file look the same; whether it has just changed."""
    try:
        look = f"{content}{path.stat().st_mtime_ns}"
    except FileNotFoundError:
        look = ""
    now = time.monotonic()
    before, since = _SEEN.get(path, (look, now))
    if before != look:
        since = now
    _SEEN[path] = look, since
    return now - since, before != look


def _text(path: Path) -> str | None:
    """None where there is no file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _who(content: str | None) -> str:
    owner = None if content is None else _parse(content)
    return str(owner or "somebody who is just creating it")


def _parse(content: str) -> Owner | None:
    """None for a file that is just being written, or is not ours."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _myself(path: Path) -> Owner:
    host, process, place = socket.gethostname(), os.getpid(), _place(path)
    return Owner(host, process, _started(process) or "", _system(), uuid.uuid4().hex, place)


def _place(path: Path) -> str:
    """The directory of a lock, whatever it is called."""
    about = path.parent.stat()
    return f"{about.st_dev}:{about.st_ino}"


def _system() -> str:
    """Names the boot of this kernel and the namespace that process numbers are of."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _started(process: int) -> str | None:
    """When a living process began (field 22 of /proc/PID/stat, after the name in parentheses); None if there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
