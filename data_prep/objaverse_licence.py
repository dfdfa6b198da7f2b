"""Licence and author of each object: most of Objaverse is under licences that want them named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.manifest import Manifest, Record
from data_prep.objaverse_hub import Hub
from data_prep.objaverse_summary import DownloadSummary
from equifeat.errors import DownloadError
from equifeat.progress import progress

_LONGEST = 300  # characters; strangers wrote them


def add_licences(
    chosen: Sequence[str], hub: Hub, manifest: Manifest, summary: DownloadSummary
) -> None:
    """Add licence, title, author and source to the rows of objects that are there.

    Args:
        chosen: The objects.
        hub: Where the metadata is.
        manifest: Receives them.
        summary: Counts them.
    """
    missing: dict[str, list[Record]] = {}
    for uid in chosen:
        row = manifest.get(uid)
        if row is not None and row.status == "ok":
            if "licence" in row.info:
                summary.licences[row.info["licence"] or "not stated"] += 1
            else:
                missing.setdefault(Path(row.info["path"]).parent.name, []).append(row)
    for folder in progress(sorted(missing), "licences"):
        name = f"metadata/{folder}.json.gz"
        try:
            entries = hub.index(name)
        except DownloadError as error:
            summary.without_licence[name] = (len(missing[folder]), str(error))
            continue
        for row in missing[folder]:
            credit = _credit(entries.get(row.id))
            manifest.put(row._replace(info={**row.info, **credit}))
            summary.licences[credit["licence"] or "not stated"] += 1


def _credit(entry: object) -> dict[str, str]:
    """What attribution needs, of an object's metadata as Sketchfab states it."""
    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    user: Mapping[str, Any] = fields["user"] if isinstance(fields.get("user"), dict) else {}

    def text(value: object) -> str:
        return value[:_LONGEST] if isinstance(value, str) else ""

    return {
        "licence": text(fields.get("license")),
        "title": text(fields.get("name")),
        "author": text(user.get("displayName")) or text(user.get("username")),
        "author_url": text(user.get("profileUrl")),
        "source": text(fields.get("viewerUrl")) or text(fields.get("uri")),
    }
