"""COLMAP models: exact values from a file packed by hand, both forms, lenses, hostile files."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equifeat.data.colmap import is_colmap, read_colmap
from equifeat.data.colmap_camera import LENSES
from equifeat.errors import EquifeatError, MissingExtraError, ViewsError
from tests.data.sparse_fixtures import SCALE, SHIFT, TURN, Truth, bend, world_pose, write_colmap

pycolmap = pytest.importorskip("pycolmap")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return write_colmap(tmp_path_factory.mktemp("capture") / "object", mixed=True)


@pytest.fixture
def model(truth: Truth, tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    for file in (truth.folder / "sparse/0").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_binary_model(truth: Truth) -> None:
    found = read_colmap(truth.folder / "sparse/0")
    assert [image.name for image in found.images] == [f"{i + 1:03d}.jpg" for i in range(5)]
    world = truth.points @ (SCALE * TURN).T + SHIFT
    for i, image in enumerate(found.images):
        camera = found.cameras[image.camera_id]
        assert camera.size_hw == truth.cameras[i].size_hw
        assert camera.distorted == (truth.ks[i] != 0)
        assert torch.equal(camera.K, truth.cameras[i].K)
        R, t = world_pose(truth.poses[i])
        assert torch.allclose(image.cam_from_world[:3, :3], R, atol=1e-9)
        assert torch.allclose(image.cam_from_world[:3, 3], t, atol=1e-9)
        # Every observation of the surface is there, with its own point.
        points = found.points3d[image.point_ids]
        for xy, row in zip(truth.xy[i][:20], truth.seen[i][:20], strict=True):
            at = (image.xy - xy).abs().sum(-1).argmin()
            assert torch.allclose(image.xy[at], xy, atol=1e-9)
            assert torch.allclose(points[at], world[row], atol=1e-9)
    assert sorted(set(found.errors.tolist())) == [0.5, 9.0]


def test_pycolmap_reads_the_fixture_alike(truth: Truth) -> None:
    """The fixture is packed by hand and read by hand: the library must agree with both."""
    theirs = pycolmap.Reconstruction(str(truth.folder / "sparse/0"))
    ours = read_colmap(truth.folder / "sparse/0")
    by_name = {image.name: image for image in theirs.images.values()}
    for image in ours.images:
        same = by_name[image.name]
        pose = torch.from_numpy(same.cam_from_world().matrix())
        assert torch.allclose(image.cam_from_world[:3], pose, atol=1e-12)
        seen = [p for p in same.points2D if p.has_point3D()]
        assert len(seen) == len(image.xy)
        for point, xy, row in zip(seen, image.xy, image.point_ids, strict=True):
            assert point.xy.tolist() == xy.tolist()
            assert theirs.points3D[point.point3D_id].xyz.tolist() == ours.points3d[row].tolist()


def test_what_pycolmap_writes_is_read(truth: Truth, tmp_path: Path) -> None:
    """Binary and text of today's COLMAP, with its rigs and frames files beside them."""
    ours = read_colmap(truth.folder / "sparse/0")
    theirs = pycolmap.Reconstruction(str(truth.folder / "sparse/0"))
    for form, write in (("binary", theirs.write_binary), ("text", theirs.write_text)):
        folder = tmp_path / form
        folder.mkdir()
        write(str(folder))
        assert any(file.stem == "rigs" for file in folder.iterdir())
        assert is_colmap(folder)
        again = read_colmap(folder)
        for a, b in zip(ours.images, again.images, strict=True):
            assert a.name == b.name
            assert torch.allclose(a.cam_from_world, b.cam_from_world, atol=1e-9)
            assert torch.allclose(a.xy, b.xy, atol=1e-9)
            assert torch.allclose(ours.points3d[a.point_ids], again.points3d[b.point_ids])


def test_lens_numbers_are_colmaps() -> None:
    for number, lens in LENSES.items():
        kind = pycolmap.CameraModelId(number)
        assert kind.name == lens.name
        camera = pycolmap.Camera.create_from_model_id(1, kind, 100.0, 64, 48)
        assert len(camera.params) == lens.params
        if lens.fx_fy_cx_cy:
            focal = camera.focal_length_idxs()
            middle = camera.principal_point_idxs()
            assert lens.fx_fy_cx_cy == (focal[0], focal[-1], middle[0], middle[1])


def test_lens_is_undone(truth: Truth) -> None:
    """Against the formula of the fixture, not against the library itself."""
    found = read_colmap(truth.folder / "sparse/0")
    lens = found.cameras[1]
    h, w = lens.size_hw
    xy = torch.rand(200, 2, dtype=torch.float64) * torch.tensor([w, h])
    bent = bend(xy, truth.cameras[0], truth.ks[0])
    assert float((bent - xy).abs().max()) > 2.0  # the lens does something
    assert torch.allclose(lens.distort(xy), bent, atol=1e-6)
    assert torch.allclose(lens.undistort(bent), xy, atol=1e-4)
    assert torch.equal(found.cameras[2].undistort(xy), xy)
    again = pickle.loads(pickle.dumps(lens))  # to a worker
    assert torch.allclose(again.distort(xy), bent, atol=1e-6)


def test_where_a_lens_folds_nothing_is_seen(truth: Truth) -> None:
    lens = read_colmap(truth.folder / "sparse/0").cameras[1]
    # u (1 + k u^2) turns back at u = 1 / sqrt(-3 k) = 1.67; at 2 focal lengths it has folded.
    far = lens.K[:2, 2] + torch.tensor([[2.2 * float(lens.K[0, 0]), 0.0]], dtype=torch.float64)
    assert bool(lens.distort(far).isnan().all())


@pytest.mark.parametrize("number", [5, 7, 8, 10, 99])
def test_unknown_lenses_are_refused(model: Path, number: int) -> None:
    data = bytearray((model / "cameras.bin").read_bytes())
    data[12:16] = struct.pack("<i", number)
    (model / "cameras.bin").write_bytes(data)
    name = LENSES[number].name if number in LENSES else "number 99"
    with pytest.raises(ViewsError, match=rf"{name}.*image_undistorter"):
        read_colmap(model)


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/passwd", "a/../../b.jpg", "c:\\x.jpg"])
def test_names_stay_in_the_folder(model: Path, name: str) -> None:
    data = (model / "images.bin").read_bytes()
    (model / "images.bin").write_bytes(data.replace(b"001.jpg\0", name.encode() + b"\0"))
    with pytest.raises(ViewsError, match="leaves the folder of pictures"):
        read_colmap(model)


@pytest.mark.parametrize("file", ["cameras.bin", "images.bin", "points3D.bin"])
def test_counts_that_lie_and_cut_files(model: Path, file: str) -> None:
    good = (model / file).read_bytes()
    for bad in (
        struct.pack("<Q", 2**60) + good[8:],
        good[:-3],
        good[:60],
        good + b"\0",
        b"",
    ):
        (model / file).write_bytes(bad)
        with pytest.raises(ViewsError, match=file.removesuffix(".bin")):
            read_colmap(model)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    file=st.sampled_from(["cameras.bin", "images.bin", "points3D.bin"]),
    at=st.integers(0, 2000),
    value=st.binary(min_size=1, max_size=9),
)
def test_damage_is_one_sentence(
    model: Path, truth: Truth, file: str, at: int, value: bytes
) -> None:
    good = (truth.folder / "sparse/0" / file).read_bytes()
    at %= len(good)
    (model / file).write_bytes(good[:at] + value + good[at + len(value) :])
    said = str(model)
    try:
        read_colmap(model)
    except EquifeatError as error:
        said = str(error)
    finally:
        (model / file).write_bytes(good)
    assert str(model) in said


def test_damaged_text_is_one_sentence(truth: Truth, tmp_path: Path) -> None:
    pycolmap.Reconstruction(str(truth.folder / "sparse/0")).write_text(str(tmp_path))
    (tmp_path / "images.txt").write_text("1 nonsense\n")
    with pytest.raises(ViewsError, match="not a COLMAP text model"):
        read_colmap(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ViewsError, match="no COLMAP model"):
        read_colmap(tmp_path)


def test_text_needs_the_extra(
    truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cameras", "images", "points3D"):
        (tmp_path / f"{name}.txt").write_text("")
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(MissingExtraError, match=r"equifeat\[captures\]"):
        read_colmap(tmp_path)
    read_colmap(truth.folder / "sparse/0")  # binary does not
