"""Download meshes of Objaverse, and the `equifeat objaverse` command.

    OUT/glbs/NNN-NNN/uid.glb    as in the dataset repo; `equifeat render OUT/glbs` names the objects
                                NNN-NNN/uid
    OUT/manifest.sqlite         what became of each uid (data_prep.manifest)
    OUT/.download/              files on their way; removed at the start and the end of a run

A file is the unit of resume: what was half-way when a run was killed is fetched again. Within a run
huggingface_hub goes on where a broken connection stopped (HTTP Range).
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.manifest import Manifest, Record
from data_prep.objaverse_fetch import FetchOptions, Outcome, fetch_object
from data_prep.objaverse_hub import REPO, Hub, quiet_hub
from data_prep.objaverse_licence import add_licences
from data_prep.objaverse_select import checked_path, is_uid, lvis_uids, random_uids, read_uids
from data_prep.objaverse_summary import DownloadSummary
from equifeat.errors import DownloadError
from equifeat.progress import progress


def download_objaverse(
    out: Path,
    uids: Path | None = None,
    random: int | None = None,
    lvis: str | None = None,
    seed: int = 0,
    revision: str = "main",
    options: FetchOptions | None = None,
) -> DownloadSummary:
    """Download GLBs of Objaverse; one that fails does not stop the others.

    Args:
        out: Receives glbs/ and manifest.sqlite.
        uids: A list of objects.
        random: Or a number of objects drawn at random.
        lvis: Or LVIS categories, with commas between.
        seed: Of the random draw.
        revision: Branch, tag or commit of the dataset repo.
        options: Workers, tries, what is tried again.

    Returns:
        What became of the objects.

    Raises:
        DownloadError: An option is wrong, the index cannot be had, the hub is silent for long, or
            the disk is full.
        ManifestError: Another run writes to the same folder.
    """
    options = options or FetchOptions()
    _check_options(uids, random, lvis, seed, options)
    wanted = read_uids(uids) if uids is not None else []
    start = time.monotonic()
    with quiet_hub(), _open_manifest(out) as manifest:
        staging = out / ".download"
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        hub = Hub(revision)
        index = {u: p for u, p in hub.index("object-paths.json.gz").items() if is_uid(u)}
        if random is not None:
            wanted = random_uids(list(index), random, seed)
        elif lvis is not None:
            wanted = lvis_uids(lvis, hub.index("lvis-annotations.json.gz"))
        chosen = list(dict.fromkeys(wanted))
        summary = DownloadSummary(duplicates=len(wanted) - len(chosen))
        try:
            jobs = list(_jobs(chosen, index, out, manifest, options, summary))
            _download(jobs, hub, out, manifest, options, summary)
            if options.licences:
                add_licences(chosen, hub, manifest, summary)
        except sqlite3.Error as error:
            raise DownloadError(
                f"{manifest.path}: cannot be written ({error}); make room, then give the same "
                "command again"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    summary.seconds = time.monotonic() - start
    return summary


def _open_manifest(out: Path) -> Manifest:
    try:
        (out / "glbs").mkdir(parents=True, exist_ok=True)
        return Manifest(out / "manifest.sqlite", "objaverse", {"repo": REPO})
    except OSError as error:
        raise DownloadError(
            f"--out {out}: cannot be written to ({error.strerror}); give another folder"
        ) from error


def _check_options(
    uids: Path | None,
    random: int | None,
    lvis: str | None,
    seed: int,
    options: FetchOptions,
) -> None:
    given = [
        name
        for name, value in (("--uids", uids), ("--random", random), ("--lvis", lvis))
        if value is not None
    ]
    if len(given) != 1:
        raise DownloadError(
            f"{' and '.join(given) or 'no objects'} given: choose the objects with exactly one of "
            "--uids FILE, --random N, --lvis CATEGORY"
        )
    least = {
        "--random": (1 if random is None else random, 1),
        "--seed": (seed, 0),
        "--workers": (options.workers, 1),
        "--tries": (options.tries, 1),
    }
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise DownloadError(f"{name} {value}: give at least {lowest}")


def _jobs(
    chosen: Sequence[str],
    index: Mapping[str, Any],
    out: Path,
    manifest: Manifest,
    options: FetchOptions,
    summary: DownloadSummary,
) -> Iterator[tuple[str, str]]:
    """(uid, path) of what is to be fetched; the rest is settled here."""
    for uid in chosen:
        row = manifest.get(uid)
        path = checked_path(uid, index.get(uid))
        if row is not None and row.status == "ok" and _is_there(out, row):
            summary.kept += 1
        elif path is None:
            why = "not in the index of the dataset"
            if uid in index:
                why = "the path in the index is not glbs/NNN-NNN/uid.glb"
            if row is None or row.why != why:
                info = {"again": False}
                manifest.put(Record(uid, "failed", why, row.attempts if row else 0, info))
            summary.fail(uid, why)
        elif (
            row is not None
            and row.status == "failed"
            and not (row.info.get("again") or options.retry_failed or row.attempts == 0)
        ):
            summary.fail(uid, row.why)
            summary.not_tried += 1
        else:
            yield uid, path


def _is_there(out: Path, row: Record) -> bool:
    try:
        file = out / str(row.info["path"])
        return file.stat().st_size == int(row.info["bytes"])
    except (OSError, KeyError, TypeError, ValueError):
        return False


def _download(
    jobs: Sequence[tuple[str, str]],
    hub: Hub,
    out: Path,
    manifest: Manifest,
    options: FetchOptions,
    summary: DownloadSummary,
) -> None:
    if not jobs:
        return
    stop = threading.Event()
    silent, patience = 0, max(10, 2 * options.workers)
    # Daemon threads: Ctrl-C does not wait for a server that hangs.
    with ThreadPool(min(options.workers, len(jobs))) as pool:
        try:
            outcomes: Iterable[Outcome] = pool.imap_unordered(
                lambda job: fetch_object(job, hub, out, options, stop), jobs
            )
            for outcome in progress(outcomes, "downloading", total=len(jobs)):
                _record(outcome, manifest, summary)
                silent = silent + 1 if outcome.silent else 0
                if silent >= patience:
                    raise DownloadError(
                        f"the last {silent} objects could not be fetched after {options.tries} "
                        f"tries each ({outcome.why}): the hub seems to be down; what is there is "
                        "kept, give the same command again later"
                    )
        finally:
            stop.set()


def _record(outcome: Outcome, manifest: Manifest, summary: DownloadSummary) -> None:
    before = manifest.get(outcome.uid)
    attempts = outcome.tries + (before.attempts if before else 0)
    if outcome.why:
        info: dict[str, Any] = {"path": outcome.path, "again": outcome.again}
        manifest.put(Record(outcome.uid, "failed", outcome.why, attempts, info))
        summary.fail(outcome.uid, outcome.why)
        return
    # what an earlier run learnt of its licence stays true
    info = {**(before.info if before else {}), "path": outcome.path, **outcome.info}
    info.pop("again", None)
    manifest.put(Record(outcome.uid, "ok", "", attempts, info))
    summary.fetched += 1
    summary.bytes += int(outcome.info["bytes"])


def objaverse_command(
    out: Path,
    uids: Path | None = None,
    random: int | None = None,
    lvis: str | None = None,
    seed: int = 0,
    workers: int = 8,
    tries: int = 6,
    revision: str = "main",
    metadata: bool = False,
    retry_failed: bool = False,
) -> DownloadSummary:
    """Download meshes of Objaverse: chosen by uid, at random, or by LVIS category.

    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are obeyed. Give the same command again to go
    on after anything that stopped it; only what is missing is fetched.

    Args:
        out: Folder that receives glbs/NNN-NNN/uid.glb and manifest.sqlite.
        uids: File that lists the objects: one uid or NNN-NNN/uid a line, or a JSON list.
        random: Number of objects drawn at random; a smaller draw is part of a larger one.
        lvis: LVIS category, or several with commas between.
        seed: Seed of the random draw.
        workers: Downloads at the same time.
        tries: How often an object is asked for before it counts as failed.
        revision: Branch, tag or commit of the dataset repo.
        metadata: Record licence and author of each object; most licences want them named.
        retry_failed: Try again what an earlier run found not to exist or to be no GLB.

    Returns:
        What became of the objects.

    Raises:
        DownloadError: An option is wrong, the hub cannot be reached, or, after all the others were
            downloaded, some objects failed.
    """
    options = FetchOptions(
        workers=workers, tries=tries, retry_failed=retry_failed, licences=metadata
    )
    summary = download_objaverse(out, uids, random, lvis, seed, revision, options)
    if summary.complaint:
        Console(stderr=True, highlight=False).print(str(summary), markup=False, soft_wrap=True)
        raise DownloadError(summary.complaint)
    return summary
