"""The check of rendered views where every part of the mesh has see-through texels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from data_prep.coverage import CoverageCheck
from data_prep.opaque import opaque_room
from data_prep.primitives import Mesh, Primitive
from data_prep.renderers.embree import EmbreeRenderer
from data_prep.viewpoints import ViewpointOptions, make_viewpoints
from equifeat.errors import RenderError

SIZE = (256, 256)


def card(alpha: Any, turned: bool = False, **more: Any) -> Primitive:
    """A unit square with a texture whose alpha is given."""
    square = np.array([[-0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, -0.5, 0], [-0.5, -0.5, 0]], np.float32)
    normals = np.tile(np.array([[0, 0, 1]], np.float32), (4, 1))
    if turned:
        square, normals = square[:, [2, 1, 0]], normals[:, [2, 1, 0]]
    alpha = np.asarray(alpha, np.uint8)
    texture = np.dstack([np.full((*alpha.shape, 3), 200, np.uint8), alpha])
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    faces = np.array([[0, 3, 2], [0, 2, 1]], np.int32)
    options = {"alpha_mode": "MASK", **more}
    return Primitive(square, faces, normals, uv=uv, texture=texture, **options)


def leaves() -> Any:
    """Round leaves with gaps, as on the cards of a tree."""
    y, x = np.mgrid[0:256, 0:256]
    return np.where((x % 64 - 32) ** 2 + (y % 64 - 32) ** 2 < 26**2, 255, 0)


def tree(**more: Any) -> Mesh:
    return Mesh("tree", [card(leaves(), **more), card(leaves(), turned=True, **more)])


def render(mesh: Mesh, view: int) -> tuple[Any, Any, Any]:
    views = make_viewpoints(ViewpointOptions(), SIZE)
    K, pose = views.K[view].numpy(), views.cam_from_world[view].numpy()
    return K, pose, np.array(EmbreeRenderer(mesh).render(K, pose, SIZE).depth)


@pytest.mark.parametrize("view", [0, 5, 17, 23, 41])
def test_true_pictures_of_foliage_pass(view: int) -> None:
    mesh = tree()
    CoverageCheck(mesh)(*render(mesh, view), "here")


@pytest.mark.parametrize("kind", ["blank", "half", "far"])
@pytest.mark.parametrize("view", [5, 17])
def test_wrong_pictures_of_foliage_do_not_pass(kind: str, view: int) -> None:
    mesh = tree()
    assert all(part.cuts for part in mesh.primitives)
    K, pose, depth = render(mesh, view)
    if kind == "blank":
        depth[:] = 0
    elif kind == "half":
        depth[:, : SIZE[1] // 2] = 0
    else:
        depth[depth > 0] += 0.2
    with pytest.raises(RenderError, match="here: the picture"):
        CoverageCheck(mesh)(K, pose, depth, "here")


def test_vertex_alpha_and_factor_count_too() -> None:
    fade = np.ones((4, 4), np.float32)
    fade[:2, 3] = 0.0  # the upper edge is clear, and BLEND cuts at one half
    plain = card(np.full((8, 8), 255), vertex_colors=fade, alpha_mode="BLEND")
    for part in (plain, replace(plain, texture=None, uv=None)):
        mesh = Mesh("fade", [part])
        assert part.cuts
        K, pose, depth = render(mesh, 17)
        CoverageCheck(mesh)(K, pose, depth, "here")
        with pytest.raises(RenderError, match="the picture"):
            CoverageCheck(mesh)(K, pose, np.zeros_like(depth), "here")


def test_leaves_smaller_than_a_pixel_still_rule_out_a_blank_picture() -> None:
    y, x = np.mgrid[0:512, 0:512]
    mesh = Mesh("fine", [card(np.where((x // 3 + y // 3) % 2, 255, 0))])
    K, pose, depth = render(mesh, 17)
    CoverageCheck(mesh)(K, pose, depth, "here")
    with pytest.raises(RenderError, match="blank"):
        CoverageCheck(mesh)(K, pose, np.zeros_like(depth), "here")


def test_a_mesh_that_is_nowhere_surely_opaque_is_not_checked() -> None:
    mesh = Mesh("mist", [card(np.where(np.eye(64) > 0, 255, 0))])
    K, pose, depth = render(mesh, 17)
    CoverageCheck(mesh)(K, pose, depth, "here")


def test_room_is_the_largest_opaque_square_around_a_texel() -> None:
    alpha = np.full((40, 50), 255)
    alpha[np.random.default_rng(0).random(alpha.shape) < 0.01] = 0
    part = card(alpha)
    y, x = (a.ravel() for a in np.mgrid[0:40, 0:50])
    # points of the lower left triangle: u, v from its corners (0, 0), (0, 1), (1, 1)
    u, v = (x + 0.5) / 50, (y + 0.5) / 40
    bary = np.stack([1 - v, v - u, u], axis=1)
    _, room = opaque_room(part, np.zeros(len(u), int), bary, np.ones(len(u)))
    for at in range(0, len(u), 7):
        side = 0
        while side <= min(x[at], y[at], 49 - x[at], 39 - y[at]):
            square = alpha[y[at] - side : y[at] + side + 1, x[at] - side : x[at] + side + 1]
            if not square.all():
                break
            side += 1
        assert room[at] == side
