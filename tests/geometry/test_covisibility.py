"""Dense correspondences against shapes that are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equifeat.geometry.camera import Camera, look_at, relative, transform
from equifeat.geometry.covisibility import correspond, dense_correspondences, overlap
from equifeat.geometry.pixels import pixel_centers, sample
from tests.synthetic import HALF, RADIUS, rays, shape_depth

UP = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def camera64(size: int) -> Camera:
    return Camera(Camera.from_focal(1.1 * size, (size, size)).K.double(), (size, size))


def pose(x: float, y: float, z: float) -> Tensor:
    return look_at(torch.tensor([x, y, z], dtype=torch.float64), torch.zeros(3).double(), UP)


def depth_of(shape: str, camera: Camera, cam_from_world: Tensor) -> Tensor:
    return shape_depth(shape, *rays(camera, cam_from_world)).reshape(camera.size_hw)


@pytest.mark.parametrize("eye1", [(1.9, 0.5, 0.3), (1.0, 1.6, 0.8), (-0.3, 1.9, 0.2)])
def test_sphere_reprojects_exactly_and_covisibility_is_right(
    eye1: tuple[float, float, float],
) -> None:
    camera = camera64(256)
    pose0, pose1 = pose(2.0, 0.0, 0.3), pose(*eye1)
    depth0, depth1 = depth_of("sphere", camera, pose0), depth_of("sphere", camera, pose1)
    found = dense_correspondences(depth0, depth1, camera, camera, relative(pose0, pose1))
    world_from_0 = torch.linalg.inv(pose0)
    world = transform(
        world_from_0,
        camera.unproject(
            pixel_centers((256, 256), dtype=torch.float64).reshape(-1, 2), depth0.reshape(-1)
        ),
    )
    solid = depth0.reshape(-1) > 0
    # Truth in closed form: a point of the sphere is seen when its normal faces the camera.
    truth_xy = camera.project(transform(pose1, world))
    eye = torch.linalg.inv(pose1)[:3, 3]
    facing = ((eye - world) * world).sum(-1) / (eye - world).norm(dim=-1) / RADIUS
    covisible = found.covisible.reshape(-1)
    error = (found.xy.reshape(-1, 2) - truth_xy)[solid].norm(dim=-1)
    assert float(error.max()) < 1e-3
    assert not (covisible & (facing < 0)).any()
    assert not (covisible & ~solid).any()
    assert torch.allclose(world[solid].norm(dim=-1), torch.tensor(RADIUS).double())
    clearly = solid & (facing > 0.5)
    assert float(covisible[clearly].double().mean()) > 0.995


def test_box_hides_its_far_faces_and_round_trips() -> None:
    camera = camera64(256)
    half = HALF.double()
    pose0, pose1 = pose(1.5, 1.1, 0.9), pose(1.5, -1.1, 0.9)
    depth0, depth1 = depth_of("box", camera, pose0), depth_of("box", camera, pose1)
    forward = dense_correspondences(depth0, depth1, camera, camera, relative(pose0, pose1))
    back = dense_correspondences(depth1, depth0, camera, camera, relative(pose1, pose0))
    xy0 = pixel_centers((256, 256), dtype=torch.float64)
    world = transform(
        torch.linalg.inv(pose0), camera.unproject(xy0.reshape(-1, 2), depth0.reshape(-1))
    ).reshape(256, 256, 3)
    # View 0 sees +x, +y and +z; view 1 sees +x, -y and +z: of the +y face nothing is covisible.
    y_face = (world[..., 1] > half[1] - 1e-9) & (world[..., 0] < half[0] - 1e-3)
    y_face &= (world[..., 2] < half[2] - 1e-3) & (depth0 > 0)
    assert int(y_face.sum()) > 1000
    assert not (forward.covisible & y_face).any()
    flat = (world[..., 0] > half[0] - 1e-9) & (world[..., 1].abs() < half[1] - 0.02)
    flat &= (world[..., 2].abs() < half[2] - 0.02) & (depth0 > 0)
    assert float(forward.covisible[flat].double().mean()) == 1.0
    landed = forward.xy[flat]
    returned = sample(back.xy.permute(2, 0, 1)[None], landed[None], (256, 256))[0]
    assert float((returned - xy0[flat]).norm(dim=-1).max()) < 0.05


def test_identity_and_overlap() -> None:
    camera = camera64(64)
    depth = depth_of("sphere", camera, pose(2.0, 0.0, 0.0))
    same = dense_correspondences(depth, depth, camera, camera, torch.eye(4, dtype=torch.float64))
    solid = depth > 0
    xy = pixel_centers((64, 64), dtype=torch.float64)
    assert torch.allclose(same.xy[solid], xy[solid])
    assert float(overlap(same, depth)) == pytest.approx(1.0)
    nothing = same._replace(covisible=torch.zeros_like(same.covisible))
    assert float(overlap(nothing, torch.zeros_like(depth))) == 0.0
    other = relative(pose(2.0, 0.0, 0.0), pose(-2.0, 0.0, 0.0))
    behind = depth_of("sphere", camera, pose(-2.0, 0.0, 0.0))
    assert overlap(dense_correspondences(depth, behind, camera, camera, other), depth) == 0.0


def test_points_outside_or_behind_are_not_covisible() -> None:
    camera = camera64(32)
    depth = torch.full((32, 32), 2.0, dtype=torch.float64)
    turned = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
    xy = torch.tensor([[16.0, 16.0]], dtype=torch.float64)
    z = torch.tensor([2.0], dtype=torch.float64)
    behind = correspond(xy, z, depth, camera, camera, turned)
    assert behind.xy.isnan().all()
    assert not behind.covisible.any()
    aside = torch.eye(4, dtype=torch.float64)
    aside[0, 3] = 10.0
    assert not correspond(xy, z, depth, camera, camera, aside).covisible.any()


def test_a_batch_of_pairs_equals_one_pair_at_a_time() -> None:
    camera = camera64(64)
    poses = [pose(2.0, 0.0, 0.3), pose(1.9, 0.5, 0.3), pose(1.0, 1.6, 0.8)]
    depths = [depth_of("sphere", camera, p) for p in poses]
    pairs = [(0, 1), (1, 2), (2, 0), (0, 2)]
    batch = dense_correspondences(
        torch.stack([depths[i] for i, _ in pairs]).reshape(2, 2, 64, 64),
        torch.stack([depths[j] for _, j in pairs]).reshape(2, 2, 64, 64),
        camera,
        camera,
        torch.stack([relative(poses[i], poses[j]) for i, j in pairs]).reshape(2, 2, 4, 4),
    )
    shares = overlap(batch, torch.stack([depths[i] for i, _ in pairs]).reshape(2, 2, 64, 64))
    for n, (i, j) in enumerate(pairs):
        one = dense_correspondences(
            depths[i], depths[j], camera, camera, relative(poses[i], poses[j])
        )
        assert torch.equal(batch.covisible[n // 2, n % 2], one.covisible)
        assert torch.equal(batch.xy[n // 2, n % 2][one.covisible], one.xy[one.covisible])
        assert torch.equal(shares[n // 2, n % 2], overlap(one, depths[i]))


def test_correspondences_have_gradients() -> None:
    camera = camera64(16)
    pose0, pose1 = pose(2.0, 0.0, 0.3), pose(1.9, 0.3, 0.3)
    depth1 = depth_of("sphere", camera, pose1)
    xy = torch.tensor([[7.5, 8.5], [9.5, 7.5]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([1.55, 1.6], dtype=torch.float64, requires_grad=True)

    def where(xy0: Tensor, z0: Tensor) -> Tensor:
        return correspond(xy0, z0, depth1, camera, camera, relative(pose0, pose1)).xy

    assert torch.autograd.gradcheck(where, (xy, z))
