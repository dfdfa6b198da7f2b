"""Identity of a data set, and lists of hashes as sha256sum writes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from equifeat.errors import EvalDataError
from equifeat.eval.data_hash import check_sums, data_hash, write_sums


def make(root: Path) -> tuple[Path, Path]:
    (root / "pictures").mkdir(parents=True)
    note, picture = root / "notes.json", root / "pictures" / "a.png"
    note.write_text("{}")
    picture.write_bytes(b"12345")
    return note, picture


def test_hash_sees_annotations_by_content_and_pictures_by_size(tmp_path: Path) -> None:
    note, picture = make(tmp_path / "a")
    first = data_hash(tmp_path / "a", [note], [picture])
    other = make(tmp_path / "b")
    assert data_hash(tmp_path / "b", [other[0]], [other[1]]) == first
    other[0].write_text("[]")
    assert data_hash(tmp_path / "b", [other[0]], [other[1]]) != first
    other[0].write_text("{}")
    other[1].write_bytes(b"1234")
    assert data_hash(tmp_path / "b", [other[0]], [other[1]]) != first


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    note, picture = make(tmp_path)
    assert check_sums(tmp_path) == (0, [])
    sums = write_sums(tmp_path)
    done = subprocess.run(["sha256sum", "-c", sums.name], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0
    assert check_sums(tmp_path) == (2, [])
    picture.write_bytes(b"54321")
    note.unlink()
    count, problems = check_sums(tmp_path)
    assert count == 2
    assert len(problems) == 2
    assert "missing" in problems[0]
    assert "hash differs" in problems[1]


@pytest.mark.parametrize("line", ["abc  notes.json", f"{'0' * 64}  ../../etc/passwd", "0" * 64])
def test_damaged_lists_are_named(tmp_path: Path, line: str) -> None:
    make(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(EvalDataError, match="line 1"):
        check_sums(tmp_path)
