"""One writer, on any file system: a lock is a file that names its owner, kept alive by a heartbeat.

Locks of the system (flock) are absent on some parallel file systems, seen by one node only on others, and survive a dead
node on NFS. This one needs nothing but that a file can be created once (O_EXCL). An owner on this host is alive while its
process is; one elsewhere while its file keeps changing. What is dead is taken over; an owner who finds its file replaced
ends at once, so that two never write.
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
from contextlib import suppress
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

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def hold(path: Path, patience_s: float = 2 * STALE_S) -> Held:
    """Become the owner of `path`, which is created; wait for an owner on another host that may be dead.

    Raises:
        Busy: its owner is alive.
        OSError: the directory cannot be written.
    """
    owner = _myself()
    deadline = time.monotonic() + patience_s
    seen: tuple[str, float] | None = None
    while True:
        try:
            descriptor = os.open(path, CREATE_ONCE, 0o644)
        except FileExistsError:
            seen = _require_dead(path, seen, deadline)
            continue
        _sign(descriptor, owner)
        return Held(path, owner)


def holder(path: Path) -> str | None:
    """Who holds `path` now, if its owner seems alive; only looks, and needs no right to write."""
    try:
        content, age = _look(path)
    except FileNotFoundError:
        return None
    owner = _parse(content)
    alive = _is_alive(owner)
    if alive is None:
        alive = age < STALE_S
    return str(owner or path) if alive else None


_HELD: set[Held] = set()


def let_go() -> None:
    """Close every lock of this process, which is about to end without unwinding."""
    for held in list(_HELD):
        held.close()


class Held:
    """A lock of this process, until `close`; its heartbeat is a thread."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
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

    def _is_mine(self) -> bool:
        return _parse(_text(self.path)) == self.owner

    def _create_again(self) -> None:
        descriptor = os.open(self.path, CREATE_ONCE, 0o644)
        try:
            _sign(descriptor, self.owner)
        except OSError:  # a full disk must not leave a file that is nobody's
            self.path.unlink()
            raise

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            try:
                if not self.path.exists():  # somebody tidied up
                    self._create_again()
                if not self._is_mine():
                    print(
                        f"{self.path} was taken over while {self.owner} stood still: ending at once, so that two never write.",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(EXIT_ROBBED)
                os.utime(self.path)
            except OSError as error:  # a server that is away for a moment; the next beat tries again
                log.debug("lock %s: %s", self.path, error)


def _require_dead(path: Path, seen: tuple[str, float] | None, deadline: float) -> tuple[str, float] | None:
    """Take a dead owner's file away, or wait a moment for one who may be dead.

    Returns:
        (what the file looked like, since when), for the next look.

    Raises:
        Busy: the owner is alive.
    """
    try:
        content, age = _look(path)
    except FileNotFoundError:
        return None
    owner = _parse(content)
    alive, now = _is_alive(owner), time.monotonic()
    if alive is None:  # on another host: nobody's clock is trusted, only whether the file changes
        try:
            look = f"{content}{path.stat().st_mtime_ns}"
        except FileNotFoundError:  # just let go
            return None
        if seen is not None and seen[0] != look:
            alive = True
        elif age > STALE_S or (seen is not None and now - seen[1] > STALE_S):
            alive = False
        elif now < deadline:
            if seen is None:
                log.info("waiting up to %.0f s for %s, which may be dead, to let go of %s", STALE_S, owner or "a writer", path)
            time.sleep(1.0)
            return seen or (look, now)
        else:
            alive = True
    if alive:
        raise Busy(str(owner or f"somebody who is just creating {path}"))
    if _take_away(path, content):
        log.info("WARNING: %s was left by %s, which is dead: taken over", path, owner or "a writer")
    return None


def _take_away(path: Path, content: str) -> bool:
    """Remove exactly the file that was judged dead; of several who try, one at a time, so that none removes a new owner's.

    Returns:
        Whether it was this one who removed it.
    """
    guard = path.with_name(path.name + ".takeover")
    try:
        os.close(os.open(guard, CREATE_ONCE, 0o644))
    except FileExistsError:
        time.sleep(0.1)
        with suppress(FileNotFoundError):
            if _look(guard)[1] > STALE_S:  # of one who died in between
                guard.unlink()
        return False
    try:
        if _text(path) != content:
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    finally:
        guard.unlink(missing_ok=True)
    return True


def _look(path: Path) -> tuple[str, float]:
    """Content of a lock file, and its age by the file system's own clock where that can be asked."""
    content, touched = _text(path), path.stat().st_mtime
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}.now")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:  # only looking, without the right to write
        now = time.time()
    return content, now - touched


def _sign(descriptor: int, owner: Owner) -> None:
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(asdict(owner)))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(content: str) -> Owner | None:
    """None for a file that is just being written, or is not ours."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _is_alive(owner: Owner | None) -> bool | None:
    """None where only the heartbeat can tell."""
    if owner is None or owner.system != _system():
        return None
    started = _started(owner.process)
    if started is None:
        try:
            os.kill(owner.process, 0)
        except PermissionError:  # somebody else's, whose /proc is hidden from us
            return True
        except ProcessLookupError:
            return False
    return started == owner.started


def _myself() -> Owner:
    return Owner(socket.gethostname(), os.getpid(), _started(os.getpid()) or "", _system(), uuid.uuid4().hex)


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
