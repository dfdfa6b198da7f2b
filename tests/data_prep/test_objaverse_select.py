"""Lists of uids, random draws, categories and paths: pure functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.objaverse_select import checked_path, lvis_uids, random_uids, read_uids
from equifeat.errors import DownloadError
from tests.data_prep.hub_server import uid_of

A, B, C = uid_of(1), uid_of(2), uid_of(3)


def test_every_format_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "uids.txt"
    file.write_text(f"\ufeff# ours\n{A}\n\n  000-023/{B}  # mug\r\nglbs/000-001/{C}.glb\n{A}\n")
    assert read_uids(file) == [A, B, C, A]
    file.write_text(json.dumps([A, f"000-023/{B}"]))
    assert read_uids(file) == [A, B]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{A}\n../../etc/passwd\n", "line 2 is '../../etc/passwd'"),
        (A.upper(), "line 1 is"),
        (f"000-023/../{A}", "line 1 is"),
        (f"{A}{B}", "line 1 is"),
        ("[1]", "entry 0 is '1'"),
        (f'["{A}"', "not valid JSON"),
        ("# nothing\n\n", "names no object"),
    ],
)
def test_bad_lists_are_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "uids.txt"
    file.write_text(text)
    with pytest.raises(DownloadError) as caught:
        read_uids(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_list(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="No such file"):
        read_uids(tmp_path / "absent.txt")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DownloadError, match="not UTF-8"):
        read_uids(tmp_path / "picture.png")


def test_random_draws_are_reproducible_and_nested() -> None:
    known = [uid_of(i) for i in range(200)]
    draw = random_uids(known, 50, seed=7)
    assert len(set(draw)) == 50
    assert random_uids(known[::-1], 50, seed=7) == draw, "the order of the index must not matter"
    assert random_uids(known, 20, seed=7) == draw[:20]
    assert random_uids(known, 50, seed=8) != draw
    with pytest.raises(DownloadError, match="has 200 objects"):
        random_uids(known, 201, seed=0)


def test_categories() -> None:
    table = {"mug": [A, B], "teapot": [B, C], "bow_(decorative_ribbons)": ["../x", A]}
    assert lvis_uids("mug", table) == [A, B]
    assert lvis_uids("mug, teapot", table) == [A, B, C]
    assert lvis_uids("bow_(decorative_ribbons)", table) == [A]
    with pytest.raises(DownloadError, match=r"no category 'tea_pot'.*Did you mean teapot"):
        lvis_uids("mug,tea_pot", table)


@pytest.mark.parametrize(
    "path",
    [
        f"glbs/000-001/../../{A}.glb",
        f"/glbs/000-001/{A}.glb",
        f"glbs/000-001/{B}.glb",
        f"glbs/000-001/{A}.glb\n",
        f"glbs/000-٠٠١/{A}.glb",
        f"../glbs/000-001/{A}.glb",
        None,
        7,
    ],
)
def test_paths_that_lead_elsewhere_are_refused(path: object) -> None:
    assert checked_path(A, f"glbs/000-001/{A}.glb") == f"glbs/000-001/{A}.glb"
    assert checked_path(A, path) is None
