"""Downloads against a real HTTP server that plays the hub, in this process."""

from __future__ import annotations

import gzip
import hashlib
import re
import resource
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from data_prep.manifest import Manifest, Record
from data_prep.objaverse import download_objaverse, objaverse_command
from data_prep.objaverse_fetch import FetchOptions
from data_prep.objaverse_summary import DownloadSummary
from equifeat.errors import DownloadError, ManifestError
from tests.data_prep.hub_server import (
    COMMIT,
    FAULTS,
    FakeHub,
    json_gz,
    objaverse_files,
    path_of,
    small_glb,
    uid_of,
)

QUICK = FetchOptions(first_wait=0.01)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub of 12 objects that huggingface_hub takes for the real one."""
    state = FakeHub(objaverse_files(12))
    with state.serve():
        # what the environment variables set when huggingface_hub is imported
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        template = state.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # huggingface_hub waits whole seconds between its own tries
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.3) / 10))
        yield state
        huggingface_hub.close_session()


def listed(tmp_path: Path, *uids: str) -> Path:
    file = tmp_path / "uids.txt"
    file.write_text("\n".join(uids))
    return file


def tree(out: Path) -> dict[str, str]:
    """SHA-256 by path below glbs/."""
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((out / "glbs").rglob("*"))
        if file.is_file()
    }


def served(hub: FakeHub, numbers: range) -> dict[str, str]:
    """What :func:`tree` must give."""
    return {path_of(i): hashlib.sha256(hub.files[path_of(i)]).hexdigest() for i in numbers}


def rows(out: Path) -> dict[str, Record]:
    with Manifest(out / "manifest.sqlite", "objaverse") as manifest:
        return {row.id: row for row in manifest.records()}


def fetch(tmp_path: Path, options: FetchOptions = QUICK, **more: Any) -> DownloadSummary:
    return download_objaverse(tmp_path / "out", options=options, **more)


def test_all_arrive_intact_from_a_hub_that_fails_often(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = objaverse_files(60)
    hub.share, hub.seed = 0.1, 3
    summary = fetch(tmp_path, random=60)
    assert summary.fetched == 60
    assert not summary.complaint
    assert tree(tmp_path / "out") == served(hub, range(60))
    assert set(hub.faults) == set(FAULTS), "the hub did not misbehave in every way"
    records = rows(tmp_path / "out")
    assert all(row.status == "ok" and row.info["checked"] for row in records.values())
    assert max(row.attempts for row in records.values()) > 1
    for i in range(60):
        info = records[uid_of(i)].info
        assert info["path"] == path_of(i)
        assert info["sha256"] == hashlib.sha256(small_glb(i)).hexdigest()
        assert info["bytes"] == len(small_glb(i))
        assert info["commit"] == COMMIT
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"glbs", "manifest.sqlite", "manifest.sqlite.lock"}
    # no second copy in the hub's cache
    assert not list((tmp_path / "cache").rglob("*.glb"))


def test_second_run_asks_for_no_glb(hub: FakeHub, tmp_path: Path) -> None:
    assert fetch(tmp_path, random=8, seed=1).fetched == 8
    hub.requests.clear()
    again = fetch(tmp_path, random=8, seed=1)
    assert (again.fetched, again.kept) == (0, 8)
    assert not hub.glb_requests()
    # a larger draw of the same seed holds the smaller
    more = fetch(tmp_path, random=12, seed=1)
    assert (more.fetched, more.kept) == (4, 8)


def test_what_is_missing_or_cut_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    fetch(tmp_path, random=12)
    out = tmp_path / "out"
    (out / path_of(3)).unlink()
    (out / path_of(4)).write_bytes(b"glTF")
    left = out / ".download" / uid_of(5)
    left.mkdir(parents=True)
    (left / "half.glb").write_bytes(b"of a killed run")
    hub.requests.clear()
    assert fetch(tmp_path, random=12).fetched == 2
    assert {path for _, path in hub.glb_requests()} == {path_of(3), path_of(4)}
    assert tree(out) == served(hub, range(12))
    assert not (out / ".download").exists()


def test_what_is_there_stays_when_the_index_drops_it(hub: FakeHub, tmp_path: Path) -> None:
    uids = listed(tmp_path, uid_of(0), uid_of(1))
    fetch(tmp_path, uids=uids)
    hub.files["object-paths.json.gz"] = json_gz({uid_of(1): path_of(1)})
    for cached in (tmp_path / "cache").rglob("object-paths.json.gz"):
        cached.resolve().unlink()
    summary = fetch(tmp_path, uids=uids)
    assert (summary.kept, summary.failures) == (2, {})


def test_unknown_and_absent_objects_are_recorded(hub: FakeHub, tmp_path: Path) -> None:
    stranger = uid_of(999)
    del hub.files[path_of(2)]
    uids = listed(tmp_path, uid_of(1), f"000-002/{uid_of(2)}", stranger, uid_of(1))
    out = tmp_path / "out"
    with pytest.raises(DownloadError, match="2 of 3 objects failed"):
        objaverse_command(out, uids, tries=1)
    records = rows(out)
    assert records[stranger].why == "not in the index of the dataset"
    assert records[uid_of(2)].why == "the hub has no such file (404)"
    assert list(tree(out)) == [path_of(1)]

    hub.requests.clear()
    summary = fetch(tmp_path, uids=uids)
    assert (summary.kept, summary.duplicates, summary.not_tried) == (1, 1, 1)
    assert "1 × the hub has no such file (404)" in str(summary)
    assert not hub.glb_requests(), "a 404 was asked for again"

    hub.files[path_of(2)] = small_glb(2)
    summary = fetch(tmp_path, QUICK._replace(retry_failed=True), uids=uids)
    assert (summary.fetched, len(summary.failures)) == (1, 1)
    assert rows(out)[uid_of(2)].attempts == 2


def test_objects_that_failed_for_the_moment_are_tried_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.always[path_of(6)] = ("500", 5)
    options = QUICK._replace(tries=2)
    summary = fetch(tmp_path, options, random=12)
    assert summary.failures == {uid_of(6): "HTTP 500"}
    assert fetch(tmp_path, options, random=12).failures, "the fault lasts five requests"
    assert fetch(tmp_path, options, random=12).fetched == 1
    assert rows(tmp_path / "out")[uid_of(6)].attempts == 6


def test_too_many_requests_wait_as_long_as_the_hub_asks(hub: FakeHub, tmp_path: Path) -> None:
    hub.always[path_of(0)] = ("429", 1)
    uids = listed(tmp_path, uid_of(0))
    start = time.monotonic()
    assert fetch(tmp_path, QUICK._replace(tries=1), uids=uids).fetched == 1
    assert time.monotonic() - start >= 1.0
    assert hub.faults["429"] == 1


def test_hub_that_stalls(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.always[path_of(0)] = ("stall", 1)
    start = time.monotonic()
    assert fetch(tmp_path, uids=listed(tmp_path, uid_of(0))).fetched == 1
    assert time.monotonic() - start < 2
    assert hub.faults["stall"] == 1


def test_other_bytes_than_promised_are_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    good = hub.files[path_of(0)]
    hub.lies[path_of(0)] = good[:-1] + bytes([good[-1] ^ 1])
    uids = listed(tmp_path, uid_of(0))
    summary = fetch(tmp_path, QUICK._replace(tries=3), uids=uids)
    assert list(summary.failures.values()) == [
        "the bytes do not have the SHA-256 that the hub told"
    ]
    assert len([r for r in hub.glb_requests() if r[0] == "GET"]) == 3
    assert not tree(tmp_path / "out"), "an unchecked file was left"
    hub.lies.clear()
    assert fetch(tmp_path, uids=uids).fetched == 1


@pytest.mark.parametrize("tell_sha", [True, False])
def test_files_that_are_no_glb(hub: FakeHub, tmp_path: Path, tell_sha: bool) -> None:
    hub.tell_sha = tell_sha
    hub.files[path_of(0)] = b"<html>please log in</html>"
    hub.files[path_of(1)] = small_glb(1) + b"tail"
    options = QUICK._replace(tries=2)
    summary = fetch(tmp_path, options, random=12)
    assert summary.fetched == 10
    assert "no GLB" in summary.failures[uid_of(0)]
    assert "another length" in summary.failures[uid_of(1)]
    # the hash says that asking again is of no use
    asked = [r for r in hub.glb_requests() if r == ("GET", path_of(0))]
    assert len(asked) == (1 if tell_sha else 2)
    assert set(tree(tmp_path / "out")) == {path_of(i) for i in range(2, 12)}
    hub.requests.clear()
    fetch(tmp_path, options, random=12)
    assert bool(hub.glb_requests()) is not tell_sha


def test_paths_of_the_index_cannot_leave_the_folder(hub: FakeHub, tmp_path: Path) -> None:
    index = {uid_of(0): f"glbs/../../{uid_of(0)}.glb", uid_of(1): path_of(1), "../x": "x"}
    hub.files["object-paths.json.gz"] = json_gz(index)
    summary = fetch(tmp_path, random=2)
    assert summary.failures == {uid_of(0): "the path in the index is not glbs/NNN-NNN/uid.glb"}
    assert list(tree(tmp_path / "out")) == [path_of(1)]
    with pytest.raises(DownloadError, match="the dataset has 2 objects"):
        fetch(tmp_path, random=3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no gzip", "not readable"),
        (json_gz({"a": "b" * 1000})[:-20], "not readable"),
        (gzip.compress(b"[1, 2]"), "list instead of a JSON object"),
        (gzip.compress(b" " * (257 * 2**20), 9), "unpacks to more than"),
    ],
    ids=["no gzip", "cut", "list", "bomb"],
)
def test_damaged_index(hub: FakeHub, tmp_path: Path, content: bytes, says: str) -> None:
    hub.files["object-paths.json.gz"] = content
    with pytest.raises(DownloadError, match=says):
        fetch(tmp_path, random=1)


def test_index_damaged_in_the_cache_is_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    fetch(tmp_path, random=1)
    (index,) = (tmp_path / "cache").rglob("object-paths.json.gz")
    index.resolve().write_bytes(b"flipped bits")
    assert fetch(tmp_path, random=2).fetched == 1


@pytest.mark.parametrize("fault", ["500", "reset", "truncated", "slow"])
def test_index_from_a_hub_that_fails(hub: FakeHub, tmp_path: Path, fault: Any) -> None:
    hub.always["object-paths.json.gz"] = (fault, 3)
    assert fetch(tmp_path, random=1).fetched == 1


def test_lvis_categories(hub: FakeHub, tmp_path: Path) -> None:
    assert fetch(tmp_path, lvis="mug,teapot").fetched == 9
    assert set(tree(tmp_path / "out")) == {path_of(i) for i in range(9)}
    with pytest.raises(DownloadError, match="Did you mean mug"):
        fetch(tmp_path, lvis="mugs")


def test_licences_are_recorded_and_missing_ones_reported(hub: FakeHub, tmp_path: Path) -> None:
    metadata = hub.files.pop("metadata/000-003.json.gz")
    fetch(tmp_path, random=12)
    assert not any("licence" in row.info for row in rows(tmp_path / "out").values())
    wanted = QUICK._replace(licences=True)
    hub.requests.clear()
    summary = fetch(tmp_path, wanted, random=12)
    assert not hub.glb_requests()
    assert "the licence of 3 objects could not be had" in summary.complaint
    info = rows(tmp_path / "out")[uid_of(5)].info
    assert (info["licence"], info["author"], info["title"]) == ("by-nc", "author 5", "object 5")
    assert info["source"] == "https://x.test/3d/5"
    hub.files["metadata/000-003.json.gz"] = metadata
    summary = fetch(tmp_path, wanted, random=12)
    assert summary.licences == {"by": 6, "by-nc": 6}
    # a file fetched anew keeps what is known of it
    (tmp_path / "out" / path_of(5)).unlink()
    fetch(tmp_path, random=12)
    assert rows(tmp_path / "out")[uid_of(5)].info["licence"] == "by-nc"


def test_hub_that_goes_down_ends_the_run(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = objaverse_files(200)
    assert fetch(tmp_path, random=20).fetched == 20
    hub.down = True
    with pytest.raises(DownloadError, match=r"last 10 objects.*HTTP 503.*same command again"):
        fetch(tmp_path, QUICK._replace(workers=2, tries=2), random=200)
    tried = [row for row in rows(tmp_path / "out").values() if row.status == "failed"]
    assert len(tried) == 10, "it should stop long before the last object"
    hub.down = False
    assert fetch(tmp_path, random=200).fetched == 180


def test_hub_that_is_down_from_the_start(hub: FakeHub, tmp_path: Path) -> None:
    hub.down = True
    with pytest.raises(DownloadError, match=r"object-paths.*could not be fetched.*HTTP 503"):
        fetch(tmp_path, random=1)


def test_nobody_listens(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(DownloadError, match=r"no answer: ConnectError.*HF_ENDPOINT"):
        fetch(tmp_path, random=1)


def test_unknown_revision(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="revision 'v9'"):
        fetch(tmp_path, random=1, revision="v9")
    assert fetch(tmp_path, random=1, revision=COMMIT).fetched == 1


def test_offline_uses_what_is_cached(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(tmp_path, random=2)
    huggingface_hub.hf_hub_download("allenai/objaverse", path_of(0), repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    offline = tmp_path / "offline"
    summary = download_objaverse(offline, random=12, options=QUICK)
    assert summary.fetched == 1
    why = "not in the cache, and offline mode is on (HF_HUB_OFFLINE)"
    assert set(summary.failures.values()) == {why}
    assert not hub.requests
    assert tree(offline) == served(hub, range(1))
    assert (offline / path_of(0)).stat().st_nlink == 2, "the cached file was copied, not linked"
    with pytest.raises(
        DownloadError, match=rf"11 of 12 objects failed, first .*: {re.escape(why)}"
    ):
        objaverse_command(offline, random=12)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert download_objaverse(offline, random=12, options=QUICK).fetched == 11


def test_damaged_cache_entry_is_not_used(hub: FakeHub, tmp_path: Path) -> None:
    cached = huggingface_hub.hf_hub_download("allenai/objaverse", path_of(0), repo_type="dataset")
    Path(cached).resolve().write_bytes(small_glb(0)[:-4] + b"ruin")
    fetch(tmp_path, random=12)
    assert tree(tmp_path / "out") == served(hub, range(12))


def test_offline_without_an_index(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"not in the cache .*HF_HUB_OFFLINE.*HF_HOME"):
        fetch(tmp_path, random=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no objects given"),
        ({"random": 1, "lvis": "mug"}, "--random and --lvis given"),
        ({"random": 0}, "--random 0"),
        ({"random": 1, "seed": -1}, "--seed -1"),
        ({"random": 1, "workers": 0}, "--workers 0"),
        ({"random": 1, "tries": 0}, "--tries 0"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(DownloadError, match=says):
        objaverse_command(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written_to(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DownloadError, match=r"--out .*cannot be written to"):
        fetch(tmp_path, random=1)


def test_two_runs_at_once_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    with (
        Manifest(tmp_path / "out" / "manifest.sqlite", "objaverse"),
        pytest.raises(ManifestError, match="another run"),
    ):
        fetch(tmp_path, random=1)


def test_full_disk_ends_the_run(hub: FakeHub, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the same error path, EFBIG for ENOSPC."""
    big = bytearray(small_glb(0) + bytes(2**20))
    big[8:12] = len(big).to_bytes(4, "little")
    hub.files[path_of(0)] = bytes(big)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        with pytest.raises(DownloadError, match=r"cannot be written .*make room"):
            fetch(tmp_path, QUICK._replace(workers=1), random=12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fetch(tmp_path, random=12).kept < 12
    assert tree(tmp_path / "out") == served(hub, range(12))


def test_manifest_on_a_full_disk(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Manifest, "put", full)
    with pytest.raises(DownloadError, match=r"manifest\.sqlite: cannot be written"):
        fetch(tmp_path, random=2)
