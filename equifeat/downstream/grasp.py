"""Carry a grasp from one object to another by descriptors of the space around the gripper.

As NDF (arXiv 2112.05124), D3Fields (arXiv 2309.16118) and SparseDFF (arXiv 2310.16838): points
fixed to the gripper are described in the demonstration; on the target, the pose of the gripper is
the one whose points have the most similar descriptors, found by gradient from several starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from equifeat.data.object_views import check_poses
from equifeat.downstream.point_cloud import PointDescriptors, checked_points
from equifeat.errors import RecipeError, ViewsError
from equifeat.eval.matching import mutual_nearest, nearest
from equifeat.geometry.camera import transform
from equifeat.seeding import torch_generator

# Energies of so many poses are computed at once.
_BLOCK = 256


@dataclass(frozen=True)
class GraspOptions:
    """How the pose is searched for.

    Args:
        candidates: Poses that are only looked at: half of them fit three points near the gripper to
            their matches on the target, half have any rotation.
        starts: The best of them, which are improved.
        steps: Steps of Adam for each.
        lr: Step size at the start, in radians and in radii of the gripper's points; it falls to 0.
        distance_weight: Weight of the difference of the distances to the nearest surface point,
            in radii of the gripper's points.
        seed: Of the candidates.
    """

    candidates: int = 1000
    starts: int = 16
    steps: int = 100
    lr: float = 0.03
    distance_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if not (1 <= self.starts <= self.candidates and self.steps >= 0 and self.lr > 0):
            raise RecipeError(
                f"starts={self.starts} must be from 1 to candidates={self.candidates}, "
                f"steps={self.steps} at least 0 and lr={self.lr:g} above 0."
            )


class TransferredGrasp(NamedTuple):
    """Where the gripper should go.

    Attributes:
        world_from_gripper: (4, 4) float64: p_world = world_from_gripper @ p_gripper.
        energy: Its energy, 0 for the very same surroundings; about 1 and more for unlike ones.
        all_poses: (S, 4, 4) of all starts, best first.
        all_energies: (S,) their energies.
    """

    world_from_gripper: Tensor
    energy: float
    all_poses: Tensor
    all_energies: Tensor


class GraspTransfer:
    """A grasp on a demonstration object, ready to be carried over.

    Args:
        demonstration: Descriptors of the object or scene it was shown on.
        world_from_gripper: (4, 4) pose of the gripper there.
        points_gripper: (Q, 3) points in the gripper's frame, where it touches and around; see
            `gripper_points`. In the unit of the clouds.

    Raises:
        ViewsError: The pose is no rotation with a translation, or the points are no (Q, 3).
    """

    def __init__(
        self, demonstration: PointDescriptors, world_from_gripper: Tensor, points_gripper: Tensor
    ) -> None:
        pose = torch.as_tensor(world_from_gripper).detach().cpu().double()
        try:
            check_poses(pose[None], "world_from_gripper")
        except ViewsError as error:
            raise ViewsError(
                "world_from_gripper must be a 4x4 rotation with a translation: p_world = "
                "world_from_gripper @ p_gripper."
            ) from error
        self.points = checked_points(points_gripper)
        self.center = self.points.mean(dim=0)
        self.radius = max(float((self.points - self.center).norm(dim=1).max()), 1e-12)
        self.demonstration, self.pose = demonstration, pose
        places = transform(pose, self.points)
        self.descriptors = demonstration.query(places)
        self.distances = demonstration.distance(places)

    def energy(
        self, target: PointDescriptors, poses: Tensor, distance_weight: float = 1.0
    ) -> Tensor:
        """Return how unlike the gripper's surroundings are to those of the demonstration.

        The mean over the gripper's points of the cosine distance between a point's descriptor in
        the demonstration and those around it on the target, weighted as the field weighs them,
        plus the weighted difference of the distances to the surface over the points' radius.

        Args:
            target: Descriptors of the target, in the unit of the demonstration.
            poses: (B, 4, 4) world_from_gripper; gradients flow to them.
            distance_weight: See `GraspOptions`.

        Returns:
            (B,) energies, float64.
        """
        return self._energy(target, self._cosines(target), poses, distance_weight)

    def to(self, target: PointDescriptors, options: GraspOptions | None = None) -> TransferredGrasp:
        """Find the gripper's pose on a target.

        Args:
            target: Its descriptors, made by the same model, in the unit of the demonstration.
            options: How.

        Returns:
            The pose of the lowest energy, and those of all starts.

        Raises:
            ViewsError: The target's descriptors have another number of channels.
        """
        options = options or GraspOptions()
        cosines = self._cosines(target)
        weight = options.distance_weight
        with torch.no_grad():
            poses = self._candidates(target, cosines, options)
            parts = torch.split(poses, _BLOCK)
            energies = torch.cat([self._energy(target, cosines, p, weight) for p in parts])
            start = poses[energies.argsort()[: options.starts]]
        moves = torch.zeros(len(start), 6, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([moves], lr=options.lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(options.steps, 1))
        for _ in range(options.steps):
            # the starts do not depend on each other
            energy = self._energy(target, cosines, self._moved(start, moves), weight).sum()
            (moves.grad,) = torch.autograd.grad(energy, moves)
            adam.step()
            falling.step()
        with torch.no_grad():
            # moving may also lead away: a start stays where that was better
            both = torch.stack([start, self._moved(start, moves)])
            energies = torch.stack([self._energy(target, cosines, p, weight) for p in both])
            best, which = energies.min(dim=0)
            found = both[which, torch.arange(len(start))]
            order = best.argsort()
        found, best = found[order], best[order]
        return TransferredGrasp(found[0], float(best[0]), found, best)

    def _cosines(self, target: PointDescriptors) -> Tensor:
        """(Q, P) similarities of the gripper's descriptors and the target's points."""
        ours, theirs = self.descriptors.shape[1], target.descriptors.shape[1]
        if ours != theirs:
            raise ViewsError(
                f"the demonstration has descriptors of {ours} channels, the target of {theirs}: "
                "make both with one model."
            )
        return (self.descriptors @ target.descriptors.mT).double()

    def _energy(
        self, target: PointDescriptors, cosines: Tensor, poses: Tensor, distance_weight: float
    ) -> Tensor:
        places = transform(poses, self.points)
        index, weight = target.weights(places)
        rows = torch.arange(len(self.points))[None, :, None]
        unlike = 1.0 - (weight * cosines[rows, index]).sum(dim=-1)
        farther = (target.distance(places) - self.distances).abs() / self.radius
        return (unlike + distance_weight * farther).mean(dim=-1)

    def _moved(self, poses: Tensor, moves: Tensor) -> Tensor:
        """Turn (S, 4, 4) poses about the points' centre by moves[:, :3], and shift by the rest."""
        turn = torch.linalg.matrix_exp(_skew(moves[:, :3]))
        center = transform(poses, self.center[None])[:, 0] + self.radius * moves[:, 3:]
        return self._pose(poses[:, :3, :3] @ turn, center)

    def _pose(self, R: Tensor, center: Tensor) -> Tensor:
        """(S, 4, 4) poses of rotations that carry the points' centre to a place."""
        out = torch.eye(4, dtype=torch.float64).repeat(len(R), 1, 1)
        out[:, :3, :3] = R
        out[:, :3, 3] = center - (R @ self.center)
        return out

    def _candidates(
        self, target: PointDescriptors, cosines: Tensor, options: GraspOptions
    ) -> Tensor:
        generator = torch_generator(options.seed, 81)
        half = options.candidates // 2
        fitted = self._fitted(target, half, generator)
        rest = options.candidates - len(fitted)
        R = _random_rotations(rest, generator)
        # the gripper's points near the surface say most about where it touches
        near = (-self.distances / (0.25 * self.radius)).exp() + 1e-6
        point = torch.multinomial(near, rest, replacement=True, generator=generator)
        alike = cosines[point].topk(min(20, cosines.shape[1]), dim=1).indices
        pick = torch.randint(alike.shape[1], (rest, 1), generator=generator)
        place = target.points[alike.gather(1, pick)[:, 0]]
        arm = (R @ (self.center - self.points[point])[..., None])[..., 0]
        return torch.cat([fitted, self._pose(R, place + arm)])

    def _fitted(self, target: PointDescriptors, count: int, generator: torch.Generator) -> Tensor:
        """Poses that carry three points near the gripper to their matches on the target."""
        demo = self.demonstration
        apart = (demo.points - transform(self.pose, self.center[None])).norm(dim=1)
        around = apart.argsort()[: max(50, int((apart < 2 * self.radius).sum()))]
        match = mutual_nearest(demo.descriptors[around], target.descriptors).matches0
        if int((match >= 0).sum()) < 3:
            match = nearest(demo.descriptors[around], target.descriptors).matches0
        around, match = around[match >= 0], match[match >= 0]
        if len(around) < 3 or not count:
            return torch.zeros(0, 4, 4, dtype=torch.float64)
        draw = torch.rand(count, len(around), generator=generator).topk(3, dim=1).indices
        a, b = demo.points[around[draw]], target.points[match[draw]]
        middle_a, middle_b = a.mean(dim=1, keepdim=True), b.mean(dim=1, keepdim=True)
        # Kabsch: the rotation that fits best, never a mirror
        u, _, vh = torch.linalg.svd((b - middle_b).mT @ (a - middle_a))
        sign = torch.linalg.det(u @ vh)
        u = torch.cat([u[..., :2], u[..., 2:] * sign[:, None, None]], dim=-1)
        R = u @ vh
        center = transform(self.pose, self.center[None])
        moved = (R @ (center - middle_a).mT).mT + middle_b
        return self._pose(R @ self.pose[:3, :3], moved[:, 0])


def gripper_points(size_xyz: tuple[float, float, float], count: int = 200, seed: int = 0) -> Tensor:
    """Return points that fill a box around the gripper's origin evenly.

    Args:
        size_xyz: Sides of the box in the gripper's axes and the clouds' unit. For a parallel
            gripper with its origin between the fingertips: a little more than the opening along
            the closing direction, the fingers' width, and how deep the object lies between them.
        count: Number of points Q.
        seed: Of the Sobol sequence.

    Returns:
        (Q, 3) float64.

    Raises:
        RecipeError: A side or the count is not above 0.
    """
    if count < 1 or min(size_xyz) <= 0:
        raise RecipeError(f"size_xyz={size_xyz} and count={count} must be above 0.")
    sobol: Any = torch.quasirandom.SobolEngine  # without types
    unit: Tensor = sobol(3, scramble=True, seed=seed).draw(count)
    return (unit.double() - 0.5) * torch.tensor(size_xyz, dtype=torch.float64)


def _skew(v: Tensor) -> Tensor:
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [zero, -z, y, z, zero, -x, -y, x, zero]
    return torch.stack(rows, dim=-1).reshape(*v.shape[:-1], 3, 3)


def _random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """Uniform rotations from random unit quaternions (Shoemake, Graphics Gems III, 1992)."""
    q = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=1).reshape(-1, 3, 3)
