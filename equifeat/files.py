"""Write whole files or none (a temporary name beside the target, then a rename); read and hash."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Asked once, at import: asking sets it for a moment, which threads that write would undo.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Give a temporary path that becomes the target when the block ends without an error.

    Args:
        target: File to write; its folder is made.

    Yields:
        A path in the same folder with the same suffix.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp_", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    path = Path(name)
    try:
        yield path
        _share(path)  # mkstemp makes private files
        path.replace(target)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Give a temporary folder that becomes the target when the block ends without an error.

    Args:
        target: Folder to write; an older one is replaced at the end.

    Yields:
        An empty folder beside the target.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f".tmp_{target.name}_", dir=target.parent))
    try:
        yield path
        path.chmod(0o755)
        for file in path.rglob("*"):  # safetensors makes private files
            if file.is_file() and not file.is_symlink():
                _share(file)
        if target.exists():
            old = path.with_name(path.name + "_old")
            target.rename(old)
            path.rename(target)
            shutil.rmtree(old)
        else:
            path.rename(target)
    finally:
        shutil.rmtree(path, ignore_errors=True)


class InUseError(Exception):
    """Another process holds a lock.

    Args:
        holder: What it wrote about itself.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@contextmanager
def lock(path: str | Path) -> Iterator[str]:
    """Hold a lock file, so that one process at a time works in a folder.

    The lock is the process's own: it ends with it, however it ends, and loader processes that
    outlive it by a moment do not hold it.

    Args:
        path: The lock file; it is made, and stays.

    Yields:
        Why there is no lock: an empty string, or the words of a file system that has none.

    Raises:
        InUseError: Another process holds it.
        OSError: The file cannot be made.
    """
    missing = ""
    with Path(path).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise InUseError(file.read().strip()) from error
            missing = error.strerror or str(error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield missing


def _share(file: Path) -> None:
    """Make a file as readable as any other one that its user writes."""
    file.chmod(0o666 & ~_UMASK)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file, read in pieces.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_gzip(path: str | Path, limit: int) -> bytes | None:
    """Unpack a gzip file, but never more than a limit: strangers' files may be bombs.

    Args:
        path: The file.
        limit: Largest unpacked size in bytes.

    Returns:
        What was packed; None when it is larger than the limit.

    Raises:
        OSError: It cannot be read, is no gzip file, or is damaged or cut off.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(limit + 1)
    except (EOFError, zlib.error) as error:
        raise OSError(str(error)) from error
    return data if len(data) <= limit else None
