"""What became of the meshes of a run."""

from __future__ import annotations

from collections import Counter
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
        kind: What sort of failure, for example "refused" or "time limit".
        earlier: Whether it failed in an earlier run and was not tried again.
        split: Seconds spent on "load", "render", "encode" and "write".
        cpu: Seconds of a core.
        peak: Most bytes of memory that the worker used; 0 when not known.
        warning: A clause about the machine that drew it, mostly empty.
    """

    source: str
    status: Status
    folder: Path | None
    views: int
    seconds: float
    error: str = ""
    kind: str = ""
    earlier: bool = False
    split: dict[str, float] = field(default_factory=dict)
    cpu: float = 0.0
    peak: int = 0
    warning: str = ""


@dataclass
class RenderSummary:
    """What became of all meshes, in numbers: a run may have a million.

    Attributes:
        renderer: The renderer used.
        reason: Why it was taken.
        seconds: Wall-clock time of the whole run.
        counts: Objects by status.
        failures: (source, error sentence) of the objects that failed.
        kinds: Failures by sort.
        earlier: Failures of earlier runs that were not tried again.
        views: Views written.
        split: Seconds of all objects spent on "load", "render", "encode" and "write".
        cpu: Core-seconds of all objects.
        peak: Most bytes of memory that a worker used; 0 when not known.
        warnings: What is not as it should be on the machines, each once.
    """

    renderer: str = ""
    reason: str = ""
    seconds: float = 0.0
    counts: Counter[Status] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    earlier: int = 0
    views: int = 0
    split: Counter[str] = field(default_factory=Counter)
    cpu: float = 0.0
    peak: int = 0
    warnings: list[str] = field(default_factory=list)

    def add(self, report: ObjectReport) -> None:
        """Count an object.

        Args:
            report: What became of it.
        """
        self.counts[report.status] += 1
        if report.status == "failed":
            self.failures.append((report.source, report.error))
            self.kinds[report.kind] += 1
            self.earlier += report.earlier
        self.views += report.views
        self.cpu += report.cpu
        self.peak = max(self.peak, report.peak)
        if report.status == "done":
            for part, seconds in report.split.items():
                self.split[part] += seconds  # type: ignore[assignment]  # seconds are counted too
        self.warn(report.warning)

    def warn(self, warning: str) -> bool:
        """Keep a warning.

        Args:
            warning: A clause; an empty one is nothing.

        Returns:
            Whether it is a new one.
        """
        new = bool(warning) and warning not in self.warnings
        if new:
            self.warnings.append(warning)
        return new

    def count(self, status: Status) -> int:
        """Return how many objects ended with a status."""
        return self.counts[status]

    @property
    def objects_per_hour(self) -> float:
        """Objects rendered now, an hour of wall-clock time."""
        return 3600.0 * self.count("done") / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        lines = [
            f"{self.count('done')} rendered, {self.count('skipped')} skipped, "
            f"{self.count('failed')} failed with {self.renderer} in {self.seconds:.1f} s: "
            f"{self.objects_per_hour:.0f} objects/hour, "
            f"{self.views / max(self.seconds, 1e-9):.1f} views/s"
        ]
        done, total = self.count("done"), sum(self.split.values())
        if done and total > 0:
            parts = ", ".join(
                f"{part} {seconds / done:.2f} s ({100 * seconds / total:.0f}%)"
                for part, seconds in self.split.items()
            )
            lines.append(f"an object: {parts}")
        if self.cpu > 0 and self.views:
            peak = f", {self.peak / 2**30:.2f} GiB peak of a worker" if self.peak else ""
            lines.append(f"{self.views / self.cpu:.2f} views per core-second{peak}")
        if self.kinds:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.most_common())
            again = f"; {self.earlier} of them in earlier runs, --retry_failed tries them again"
            lines.append(f"failed: {kinds}{again if self.earlier else ''}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)
