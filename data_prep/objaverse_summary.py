"""What became of the objects of a download."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DownloadSummary:
    """Counts of one run; its text is shown at the end.

    Attributes:
        fetched: Objects downloaded now.
        bytes: Their size.
        kept: Objects that were there before.
        duplicates: Objects that the list names again.
        not_tried: Of those failed, how many an earlier run found to be hopeless.
        failures: Why, by uid.
        licences: Number of objects by licence, when asked for.
        without_licence: Number of objects and why, by metadata file that could not be had.
        seconds: Wall-clock time.
    """

    fetched: int = 0
    bytes: int = 0
    kept: int = 0
    duplicates: int = 0
    not_tried: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    licences: Counter[str] = field(default_factory=Counter)
    without_licence: dict[str, tuple[int, str]] = field(default_factory=dict)
    seconds: float = 0.0

    def fail(self, uid: str, why: str) -> None:
        """Note a failure.

        Args:
            uid: The object.
            why: A few words.
        """
        self.failures[uid] = why

    @property
    def complaint(self) -> str:
        """One sentence when something is missing, else an empty string."""
        if self.failures:
            uid, why = next(iter(self.failures.items()))
            total = self.fetched + self.kept + len(self.failures)
            return f"{len(self.failures)} of {total} objects failed, first {uid}: {why}"
        if self.without_licence:
            objects = sum(count for count, _ in self.without_licence.values())
            why = next(iter(self.without_licence.values()))[1]
            return f"the licence of {objects} objects could not be had: {why}"
        return ""

    def __str__(self) -> str:
        rate = self.bytes / self.seconds / 1e6 if self.seconds else 0.0
        lines = [
            f"{self.fetched} objects downloaded ({self.bytes / 1e6:.1f} MB, {rate:.1f} MB/s), "
            f"{self.kept} there before, {len(self.failures)} failed, in {self.seconds:.1f} s"
        ]
        if self.duplicates:
            lines.append(f"  {self.duplicates} duplicates in the list passed over")
        lines += [f"  {n} × {why}" for why, n in Counter(self.failures.values()).most_common()]
        if self.not_tried:
            lines.append(f"  {self.not_tried} of these not tried again; --retry-failed does")
        if self.licences:
            kinds = ", ".join(f"{n} × {kind}" for kind, n in self.licences.most_common())
            lines.append(f"  licences: {kinds}")
        lines += [f"  {n} licences missing: {why}" for n, why in self.without_licence.values()]
        return "\n".join(lines)
