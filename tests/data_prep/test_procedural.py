from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.mesh import Mesh, load_mesh
from data_prep.procedural import make_object, write_procedural
from data_prep.renderers.embree import EmbreeRenderer
from data_prep.viewpoints import ViewpointOptions, make_viewpoints
from equifeat.errors import RenderError
from equifeat.geometry.camera import Camera, relative, rotation_angle_deg
from equifeat.geometry.covisibility import dense_correspondences
from equifeat.geometry.pixels import pixel_centers, sample
from tests.helpers import shared_dir

SIZE = (512, 512)


def test_written_object_is_the_made_one_and_depends_on_the_seed(tmp_path: Path) -> None:
    paths = write_procedural(tmp_path / "objects", [4, 5])
    assert [p.name for p in paths] == ["procedural_0004.glb", "procedural_0005.glb"]
    assert not list(tmp_path.rglob("*.partial"))
    made, loaded, other = make_object(4), load_mesh(paths[0]), load_mesh(paths[1])
    assert made.sha256 == loaded.sha256 != other.sha256
    np.testing.assert_array_equal(made.vertices, loaded.vertices)
    assert len(made.primitives) >= 10
    assert all(p.texture is not None for p in made.primitives)
    assert made.num_faces > 500
    with pytest.raises(RenderError, match="seed"):
        make_object(-1)


def test_objects_are_asymmetric_and_rich() -> None:
    views = make_viewpoints(ViewpointOptions(), (128, 128))
    for seed in (0, 1):
        mesh = make_object(seed)
        opened = EmbreeRenderer(mesh)
        front, back = (
            opened.render(views.K[i].numpy(), views.cam_from_world[i].numpy(), (128, 128))
            for i in (0, 2)
        )
        assert len(np.unique(front.color[front.mask] // 16, axis=0)) > 100
        same = front.mask & back.mask[:, ::-1]
        assert same.sum() / (front.mask | back.mask[:, ::-1]).sum() < 0.97
        assert np.abs(front.color.astype(int) - back.color[:, ::-1])[same].mean() > 20


def round_trip(mesh: Mesh) -> None:
    """Dense correspondences there and back again, and against a ray cast at the very point."""
    views = make_viewpoints(ViewpointOptions(), SIZE)
    poses = views.cam_from_world
    opened = EmbreeRenderer(mesh)
    turn = rotation_angle_deg(poses[:, :3, :3] @ poses[3, :3, :3].T)
    pair = (3, int((turn - 40).abs().argmin()))
    camera0, camera1 = (Camera(views.K[i], SIZE) for i in pair)
    rendered = [opened.render(views.K[i].numpy(), poses[i].numpy(), SIZE) for i in pair]
    depth0, depth1 = (torch.from_numpy(r.depth).double() for r in rendered)
    there = relative(poses[pair[0]], poses[pair[1]])
    back = relative(poses[pair[1]], poses[pair[0]])
    # 0.03 px by each step leaves room for interpolating xy instead of 1/z below
    forth = dense_correspondences(depth0, depth1, camera0, camera1, there, max_error_px=0.03)
    home = dense_correspondences(depth1, depth0, camera1, camera0, back, max_error_px=0.03)
    xy0 = pixel_centers(SIZE, dtype=torch.float64)[forth.covisible]
    xy1 = forth.xy[forth.covisible]
    assert len(xy0) > 0.3 * int((depth0 > 0).sum())
    seen = home.covisible.double()
    layers = torch.cat([home.xy.nan_to_num() * seen[..., None], seen[..., None]], dim=-1)
    found = sample(layers.permute(2, 0, 1)[None], xy1[None], SIZE)[0]
    whole = found[:, 2] > 1 - 1e-9
    error = (found[whole, :2] - xy0[whole]).norm(dim=-1)
    assert int(whole.sum()) > 0.7 * len(xy0)
    assert float(error.max()) < 0.05
    # the oracle: what a ray of view 1 through the corresponding point really hits
    hits = opened._cast(views.K[pair[1]].numpy(), poses[pair[1]].numpy(), xy1.numpy())
    z1 = torch.from_numpy(hits.depth)
    lifted = camera1.unproject(xy1[torch.from_numpy(hits.ray)], z1)
    landed = camera0.project(lifted @ back[:3, :3].T + back[:3, 3])
    miss = (landed - xy0[torch.from_numpy(hits.ray)]).norm(dim=-1)
    assert len(hits.ray) >= 0.999 * len(xy0)
    assert float(miss.quantile(0.999)) < 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dense_correspondences_round_trip_below_a_twentieth_of_a_pixel(seed: int) -> None:
    round_trip(make_object(seed))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["cordless_drill", "reactor", "prius_hybrid"])
def test_dense_correspondences_round_trip_on_validation_meshes(name: str) -> None:
    round_trip(load_mesh(shared_dir("meshes/val") / f"{name}.glb"))
