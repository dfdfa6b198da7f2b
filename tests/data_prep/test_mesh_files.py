from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.mesh_files import find_objects
from data_prep.render import find_meshes
from equifeat.errors import MeshError, RenderError


@pytest.fixture
def glbs(tmp_path: Path) -> Path:
    """The reference's own layout of Objaverse, and what lies about in such folders."""
    for name in ("000-000/b.glb", "000-001/a.GLB", "c.obj", "c.mtl", ".git/d.glb", "e/.f.glb"):
        file = tmp_path / "glbs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"mesh")
    return tmp_path / "glbs"


def test_names_are_paths_in_the_folder(glbs: Path) -> None:
    objects = find_objects([glbs])
    assert list(objects) == ["000-000/b", "000-001/a", "c"]
    assert objects["000-001/a"] == glbs / "000-001" / "a.GLB"
    assert find_meshes([str(glbs)]) == list(objects.values())
    assert list(find_objects([glbs / "000-000" / "b.glb"])) == ["b"]


def test_patterns_and_lists(glbs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(find_objects([glbs / "000-*" / "*.glb"])) == ["000-000/b"]
    assert list(find_objects([glbs / "**" / "*"])) == ["000-000/b", "000-001/a", "c"]
    monkeypatch.chdir(glbs)
    assert list(find_objects(["000-00?/[ab].*"])) == ["000-000/b", "000-001/a"]
    listed = tmp_path / "list.txt"
    listed.write_text("# chosen\n\nglbs/c.obj\n000-000/../glbs/c.obj\n")
    with pytest.raises(MeshError, match=r"lists '000-000/../glbs/c.obj', which is no file"):
        find_objects([listed])
    listed.write_text(f"# chosen\n\nglbs/c.obj\n{glbs}/000-000/b.glb\n")
    assert list(find_objects([listed])) == ["glbs/c", "b"]


def test_what_cannot_be_told_apart_is_refused(glbs: Path, tmp_path: Path) -> None:
    (glbs / "c.glb").write_bytes(b"mesh")
    with pytest.raises(RenderError, match=r"c.glb and .*c.obj would both be written to 'c'"):
        find_objects([glbs])
    (glbs / "c.glb").rename(glbs / "000-000.glb")
    with pytest.raises(RenderError, match=r"'000-000/b' would be written into those of '000-000'"):
        find_objects([glbs])
    # one file given twice is one object
    assert len(find_objects([glbs / "c.obj", glbs / "c.obj"])) == 1


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("gone.glb", "gone.glb: no such mesh file or folder"),
        ("glbs/e", "no .glb, .gltf, .obj, .ply file in this folder"),
        ("glbs/*.ply", "file fits this pattern"),
        ("empty.txt", "this list names no mesh"),
        ("binary.txt", "cannot be read as a list"),
    ],
)
def test_nothing_to_render(glbs: Path, tmp_path: Path, path: str, sentence: str) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(MeshError, match=sentence):
        find_objects([tmp_path / path])
