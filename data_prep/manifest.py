"""What became of every object of a long job: an SQLite table that survives SIGKILL.

One process writes, the one that hands out the work; each record is committed before the next.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from equifeat.errors import ManifestError

Outcome = Literal["ok", "failed"]

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS job (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS objects (
    id TEXT PRIMARY KEY,
    status TEXT NOT NULL CHECK (status IN ('ok', 'failed')),
    why TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    info TEXT NOT NULL
);
"""


class Record(NamedTuple):
    """One row.

    Attributes:
        id: The object.
        status: "ok" or "failed".
        why: One sentence when it failed, else empty.
        attempts: How often it was tried, over all runs.
        info: What the job wants to remember, as JSON values.
    """

    id: str
    status: Outcome
    why: str
    attempts: int
    info: dict[str, Any]


class Manifest:
    """The table of one job. Use it as a context manager.

    Args:
        path: The SQLite file; its folder is made.
        kind: What the job is, for example "render"; a file of another kind is refused.
        settings: What must be equal for the rows to mean the same; None accepts any.
        start_anew: Whether to forget all rows when the settings differ, rather than to refuse.

    Raises:
        ManifestError: Not a manifest, of another job or other settings, or in use by another run.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        settings: dict[str, Any] | None = None,
        start_anew: bool = False,
    ) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # SQLite locks a transaction, this locks the whole run: two runs would do the work twice.
        self._lock = path.with_name(path.name + ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ManifestError(
                f"{path}: another run is writing to it; wait for it or give another --out"
            ) from error
        try:
            # no WAL: it needs shared memory, which network file systems do not have
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript(_SCHEMA)
            self._check({"kind": kind, "version": _VERSION}, "is the manifest of another job")
            if start_anew and self._differences(settings or {}):
                self._db.execute("DELETE FROM objects")
                self._db.execute("DELETE FROM job WHERE key NOT IN ('kind', 'version')")
            self._check(settings or {}, "was started with other settings")
        except sqlite3.DatabaseError as error:
            self.close()
            raise ManifestError(
                f"{path}: not a readable manifest ({error}); move it away to start anew"
            ) from error
        except ManifestError:
            self.close()
            raise

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let another run in."""
        if hasattr(self, "_db"):
            self._db.close()
        self._lock.close()

    def get(self, id: str) -> Record | None:
        """Return an object's row.

        Args:
            id: The object.

        Returns:
            The row, None when the object was never finished.
        """
        row = self._db.execute("SELECT * FROM objects WHERE id = ?", (id,)).fetchone()
        return None if row is None else _record(row)

    def put(self, record: Record) -> None:
        """Write a row and commit it; an older one of the object is replaced.

        Args:
            record: The row.
        """
        values = (*record[:4], json.dumps(record.info, sort_keys=True))
        self._db.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)", values)

    def forget(self, id: str) -> None:
        """Remove a row.

        Args:
            id: The object; nothing happens when it has no row.
        """
        self._db.execute("DELETE FROM objects WHERE id = ?", (id,))

    def records(self, status: Outcome | None = None) -> Iterator[Record]:
        """Iterate over the rows by id.

        Args:
            status: Only these.

        Yields:
            Rows.
        """
        where, values = ("", ()) if status is None else (" WHERE status = ?", (status,))
        for row in self._db.execute(f"SELECT * FROM objects{where} ORDER BY id", values):
            yield _record(row)

    def count(self, status: Outcome) -> int:
        """Return how many objects have a status.

        Args:
            status: "ok" or "failed".

        Returns:
            Their number.
        """
        query = "SELECT COUNT(*) FROM objects WHERE status = ?"
        return int(self._db.execute(query, (status,)).fetchone()[0])

    def _differences(self, wanted: dict[str, Any]) -> list[str]:
        found = dict(self._db.execute("SELECT key, value FROM job"))
        texts = {key: json.dumps(value, sort_keys=True) for key, value in wanted.items()}
        return [
            f"{key} {found[key]} instead of {text}"
            for key, text in texts.items()
            if found.get(key, text) != text
        ]

    def _check(self, wanted: dict[str, Any], complaint: str) -> None:
        differ = self._differences(wanted)
        if differ:
            raise ManifestError(
                f"{self.path}: {complaint} ({', '.join(differ)}); "
                "give the same ones or another --out"
            )
        rows = [(key, json.dumps(value, sort_keys=True)) for key, value in wanted.items()]
        self._db.executemany("INSERT OR IGNORE INTO job VALUES (?, ?)", rows)


def _record(row: tuple[Any, ...]) -> Record:
    id, status, why, attempts, info = row
    return Record(id, status, why, attempts, json.loads(info))
