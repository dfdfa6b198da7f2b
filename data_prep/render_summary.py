"""What became of the meshes of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class ObjectReport:
    """What became of one mesh.

    Attributes:
        source: The mesh file, or the object's name.
        status: "done", "skipped" (finished earlier) or "failed".
        folder: The object's folder, None when it failed.
        views: Number of views written now.
        seconds: Wall-clock time.
        error: One sentence, empty unless it failed.
    """

    source: str
    status: Status
    folder: Path | None
    views: int
    seconds: float
    error: str = ""


@dataclass
class RenderSummary:
    """What became of all meshes.

    Attributes:
        reports: One an object, in order of completion.
        renderer: The renderer used.
        reason: Why it was taken.
        seconds: Wall-clock time of the whole run.
    """

    reports: list[ObjectReport] = field(default_factory=list)
    renderer: str = ""
    reason: str = ""
    seconds: float = 0.0

    def count(self, status: Status) -> int:
        """Return how many objects ended with a status."""
        return sum(r.status == status for r in self.reports)

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(source, error sentence) of the objects that failed."""
        return [(r.source, r.error) for r in self.reports if r.status == "failed"]

    @property
    def objects_per_hour(self) -> float:
        """Objects rendered now, an hour of wall-clock time."""
        return 3600.0 * self.count("done") / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        views = sum(r.views for r in self.reports)
        return (
            f"{self.count('done')} rendered, {self.count('skipped')} skipped, "
            f"{self.count('failed')} failed with {self.renderer} in {self.seconds:.1f} s: "
            f"{self.objects_per_hour:.0f} objects/hour, "
            f"{views / max(self.seconds, 1e-9):.1f} views/s"
        )
