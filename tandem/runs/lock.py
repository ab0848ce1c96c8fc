"""One process a run folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from tandem.errors import UserError


class FolderLock:
    """Holds a file's lock until ``release`` or the end of the process, however it ends. The file stays."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where another process holds it, and names that process."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise UserError(
                f"{path.parent}: {holder or 'another process'} is writing this run; stop it, or give another --out"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._descriptor)
