"""Locks of the operating system on open files: they go with the process that holds them, however it ends."""

from __future__ import annotations

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second command out
    fcntl = None  # type: ignore[assignment]

KNOWN = fcntl is not None


def lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file against other processes; False where another has it, if that is not waited for. Without effect
    where the system or the file system knows no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
