"""One process at a time works on a folder."""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from czsl_heads._files import is_running, read_json, write_json
from czsl_heads.training.trainer import is_main_process

LOCK, HOLDER = ".lock", ".holder.json"
_PATIENCE = 15  # seconds that the workers of a killed process may take to notice it


class FolderBusyError(OSError):
    """Another process works on a folder."""


class Holder:
    """Holds a folder for this process, from :meth:`take` to the end of the block.

    The system lets go of the lock when a process dies, so that of a dead one is taken over. Of the processes that
    train one model on several devices, the first one holds the folder for all.

    Args:
        folder: The folder; it is made when it is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: FileLock | None = None

    def __enter__(self) -> Holder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        (self.folder / HOLDER).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None

    def take(self) -> None:
        """Hold the folder; a second call changes nothing.

        Raises:
            FolderBusyError: Another process holds it; the message tells which, and since when.
            OSError: The folder cannot be written.
        """
        if self._lock is not None or not is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._wait(lock)
        self._lock = lock
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        write_json(self.folder / HOLDER, {"host": socket.gethostname(), "pid": os.getpid(), "since": since})

    def _wait(self, lock: FileLock) -> None:
        """Take the lock of a process that is dead, whose workers may live on for some seconds."""
        end = time.monotonic() + _PATIENCE
        while True:
            holder = self._holder()
            here = holder.get("host") == socket.gethostname()
            dead = here and not is_running(int(holder["pid"]))
            try:
                lock.acquire(timeout=1 if dead else 0)
                return
            except Timeout as error:
                if not dead or time.monotonic() > end:
                    raise FolderBusyError(self._told(holder)) from error

    def _holder(self) -> dict[str, str]:
        """Who wrote down that it holds the folder; empty where nobody has yet."""
        try:
            found = read_json(self.folder / HOLDER)
            return {"host": str(found["host"]), "pid": str(int(found["pid"])), "since": str(found["since"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _told(self, holder: dict[str, str]) -> str:
        who = "another process"
        if holder:
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        return f"expected `out` that no other command works on, got {self.folder}, which is held by {who}"
