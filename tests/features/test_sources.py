"""Which files are found, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equifeat.errors import ImageError, RecipeError
from equifeat.features.sources import find_sources


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a/1.jpg", "b/1.jpg", "b/deep/2.PNG", "b/clip.mp4", "b/notes.md", ".hid/3.jpg"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path


def names(*words: str | Path, **options: Any) -> list[str]:
    return [file.name for file in find_sources(words, **options).files]


def test_names_are_relative_to_what_holds_everything(tree: Path) -> None:
    everything = ["a/1.jpg", "b/1.jpg", "b/clip.mp4", "b/deep/2.PNG"]
    assert names(tree) == everything
    assert names(tree / "a", tree / "b") == everything
    assert names(tree / "b") == ["1.jpg", "clip.mp4", "deep/2.PNG"]
    assert names(tree / "a" / "1.jpg", tree / "b" / "1.jpg") == ["a/1.jpg", "b/1.jpg"]
    assert names(tree / "b" / "1.jpg") == ["1.jpg"]
    assert names(tree / "b" / "1.jpg", root=tree) == ["b/1.jpg"]
    assert names(tree / "a", tree / "a" / ".." / "a" / "1.jpg") == ["1.jpg"]
    found = find_sources([tree / "b"]).files
    assert [file.video for file in found] == [False, True, False]
    assert found[2].path == str(tree / "b" / "deep" / "2.PNG")


def test_globs_and_lists(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(tree / "*" / "*.jpg") == ["a/1.jpg", "b/1.jpg"]
    assert names(tree / "**" / "*.PNG") == ["b/deep/2.PNG"]
    assert names(tree / "b" / "*.*") == ["1.jpg", "clip.mp4"]
    assert names(tree / "[b]*") == ["b/1.jpg", "b/clip.mp4", "b/deep/2.PNG"]
    listed = tree / "list.txt"
    listed.write_text("# two images\na/1.jpg\n\nb/missing.jpg\n")
    assert names(listed) == ["a/1.jpg", "b/missing.jpg"]
    odd = tree / "[x].jpg"
    odd.touch()
    assert names(odd) == ["[x].jpg"]
    monkeypatch.chdir(tree / "b")
    assert names("1.jpg", "../a/1.jpg") == ["a/1.jpg", "b/1.jpg"]


def test_a_link_keeps_its_name(tree: Path) -> None:
    (tree / "a" / "link.jpg").symlink_to(tree / "b" / "1.jpg")
    assert names(tree / "a") == ["1.jpg", "link.jpg"]


def test_the_output_is_not_an_input(tree: Path) -> None:
    out = tree / "b"
    assert names(tree, tree / "*" / "*.jpg", skip=[out]) == ["a/1.jpg"]


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("no.jpg", "no such image file"),
        ("a/*.gif", "no file fits"),
        ("b/notes.md/", "image"),
        ("empty", "no image or video"),
    ],
)
def test_what_is_missing_is_named(tree: Path, word: str, match: str) -> None:
    (tree / "empty").mkdir()
    if word.startswith("b/notes"):  # a file named itself may end in anything
        assert names(tree / "b" / "notes.md") == ["notes.md"]
        return
    with pytest.raises(ImageError, match=match):
        names(tree / word)


def test_a_root_must_hold_everything(tree: Path) -> None:
    with pytest.raises(RecipeError, match=r"b/1\.jpg lies outside of --root"):
        names(tree / "b" / "1.jpg", root=tree / "a")
