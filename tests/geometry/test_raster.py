"""The rasteriser against the ray caster of data_prep, and against planes known in closed form."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.mesh import Mesh
from data_prep.procedural import make_object
from data_prep.renderers import open_renderer
from equifeat.geometry.camera import look_at, transform
from equifeat.geometry.raster import rasterize_depth

K = torch.tensor([[300.0, 0, 83.3], [0, 304.0, 58.7], [0, 0, 1]], dtype=torch.float64)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_object(2)


def surface(mesh: Mesh) -> tuple[Tensor, Tensor]:
    counts = np.cumsum([0, *(len(p.vertices) for p in mesh.primitives)])
    faces = [p.faces + at for p, at in zip(mesh.primitives, counts, strict=False)]
    vertices = torch.from_numpy(mesh.vertices).double()
    return vertices, torch.from_numpy(np.concatenate(faces)).long()


@pytest.mark.parametrize(
    "eye", [(1.2, 0.5, 0.9), (-0.4, 1.6, -0.2), (0.3, 0.2, 0.35)], ids=["far", "side", "near"]
)
def test_depth_is_that_of_the_ray_caster(mesh: Mesh, eye: tuple[float, float, float]) -> None:
    # from the third one the camera looks from within the box: triangles reach behind it
    pose = look_at(
        torch.tensor(eye).double(), torch.zeros(3).double(), torch.tensor([0, 0, 1.0]).double()
    )
    vertices, faces = surface(mesh)
    drawn = rasterize_depth(transform(pose, vertices), faces, K, (120, 160))
    renderer = open_renderer("embree", mesh)
    try:
        cast = torch.from_numpy(renderer.render(K.numpy(), pose.numpy(), (120, 160)).depth).double()
    finally:
        renderer.close()
    seen = (drawn > 0) & (cast > 0)
    assert int(seen.sum()) > 1000
    # a ray through an edge may go either way
    assert int(((drawn > 0) != (cast > 0)).sum()) <= 2
    off = (drawn - cast).abs()[seen] > 1e-5
    assert int(off.sum()) <= 2


def test_a_slanted_plane_has_its_exact_depth_and_no_seam() -> None:
    # z = 2 + x + y/2 over a square cut into two triangles, larger than the image
    xy = torch.tensor([[-1.5, -1.5], [1.5, -1.5], [1.5, 1.5], [-1.5, 1.5]]).double()
    corners = torch.cat([xy, 4.0 + xy @ torch.tensor([[1.0], [0.5]]).double()], dim=1)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    K = torch.tensor([[60.0, 0, 8.0], [0, 60.0, 6.0], [0, 0, 1]], dtype=torch.float64)
    drawn = rasterize_depth(corners, faces, K, (12, 16))
    for row in range(12):
        for column in range(16):
            # the ray (u, v, 1) z meets z = 4 + u z + v z / 2
            u, v = (column + 0.5 - 8.0) / 60.0, (row + 0.5 - 6.0) / 60.0
            exact = 4.0 / (1.0 - u - 0.5 * v)
            assert drawn[row, column].item() == pytest.approx(exact, rel=1e-12)


def test_nearest_wins_and_both_sides_are_drawn() -> None:
    def square(z: float) -> Tensor:
        return torch.tensor([[-1, -1, z], [1, -1, z], [1, 1, z]]).double()

    corners = torch.cat([square(5.0), square(3.0)])
    K = torch.tensor([[4.0, 0, 2.0], [0, 4.0, 2.0], [0, 0, 1]], dtype=torch.float64)
    one = rasterize_depth(corners, torch.tensor([[0, 1, 2], [3, 4, 5]]), K, (4, 4))
    other = rasterize_depth(corners, torch.tensor([[5, 4, 3], [2, 1, 0]]), K, (4, 4))
    assert torch.equal(one, other)
    assert set(one.flatten().tolist()) <= {0.0, 3.0, 5.0}
    assert one[1, 2].item() == 3.0


def test_what_is_behind_the_camera_is_not_drawn() -> None:
    corners = torch.tensor([[0.0, 0, -1], [1, 0, -1], [0, 1, -1]])
    assert not rasterize_depth(corners, torch.tensor([[0, 1, 2]]), K, (8, 8)).any()
    assert not rasterize_depth(corners, torch.zeros(0, 3).long(), K, (8, 8)).any()
    # reaching through the camera's plane: what is in front remains
    through = torch.tensor([[0.0, 0.1, 2], [-1, 0.1, -1], [1, 0.1, -1]]).double()
    middle = torch.tensor([[4.0, 0, 4.0], [0, 4.0, 4.0], [0, 0, 1]])
    drawn = rasterize_depth(through, torch.tensor([[0, 1, 2]]), middle, (8, 8))
    assert drawn[7, 4].item() == pytest.approx(0.1 / (3.5 / 4.0), rel=1e-6)
    assert not drawn[:4].any()


def test_ten_thousand_triangles_take_well_below_a_second(mesh: Mesh) -> None:
    vertices, faces = surface(mesh)
    faces = faces.repeat(1 + 10_000 // len(faces), 1)[:10_000]
    pose = look_at(
        torch.tensor([1.2, 0.5, 0.9]).double(),
        torch.zeros(3).double(),
        torch.tensor([0, 0, 1.0]).double(),
    )
    corners = transform(pose, vertices)
    large = torch.tensor([[800.0, 0, 320], [0, 800, 240], [0, 0, 1]]).double()
    rasterize_depth(corners, faces, large, (480, 640))
    times = []
    for _ in range(5):
        start = time.process_time()
        drawn = rasterize_depth(corners, faces, large, (480, 640))
        times.append(time.process_time() - start)
    assert int((drawn > 0).sum()) > 50_000
    # processor time of all threads: some 0.3 s, so that a busy machine does not matter
    assert min(times) < 2.0
