from __future__ import annotations

from pathlib import Path

import pytest

from equifeat.files import atomic_file, atomic_folder


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic_file(target) as path:
        path.write_text("old")

    def fail() -> None:
        with atomic_file(target) as path:
            path.write_text("new")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]
    assert target.stat().st_mode & 0o400


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for name in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["two"]

    def fail() -> None:
        with atomic_folder(target) as folder:
            (folder / "three").write_text("")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_is_written_is_as_readable_as_any_other_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with atomic_file(tmp_path / "file") as path:
        path.write_text("")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "sub").mkdir()
        private = folder / "sub" / "weights"
        private.touch(mode=0o600)  # as safetensors does
    for file in (tmp_path / "file", tmp_path / "folder" / "sub" / "weights"):
        assert file.stat().st_mode == plain.stat().st_mode
