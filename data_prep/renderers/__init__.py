"""Renderers: the only importers of GL, ray-casting and path-tracing packages.

Three of them behind one Protocol. ``auto`` takes pyrender where EGL works and embree elsewhere,
never cycles, whose pictures are of another kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

from data_prep.mesh import Mesh
from data_prep.renderers.lights import FIXED_LIGHT, Lights
from equifeat.errors import RenderError, suggest

if TYPE_CHECKING:
    from data_prep.renderers.cycles import CyclesOptions

RendererName = Literal["auto", "pyrender", "embree", "cycles"]
RENDERERS = ("auto", "pyrender", "embree", "cycles")


class Rendered(NamedTuple):
    """One view.

    Attributes:
        color: (H, W, 3) uint8 sRGB, antialiased over black.
        depth: (H, W) float32 z-depth at the pixel centres in object units, 0 = background.
        mask: (H, W) bool, depth > 0.
        normals: (H, W, 3) float32 unit normals in camera axes, facing the camera, 0 = background;
            None unless asked for.
        coverage: (H, W) uint8, the object's share of each pixel of ``color`` times 255; None when
            the renderer does not tell, and then the mask stands in.
    """

    color: NDArray[Any]
    depth: NDArray[Any]
    mask: NDArray[Any]
    normals: NDArray[Any] | None
    coverage: NDArray[Any] | None = None


@runtime_checkable
class Renderer(Protocol):
    """Draws views of one mesh.

    Attributes:
        name: "pyrender", "embree" or "cycles".
        version: Version of the package.
        device: What drew it: GL_RENDERER, "CPU", or the name of a GPU.
        details: More for the record: versions and settings, as JSON.
    """

    name: str
    version: str
    device: str
    details: dict[str, Any]

    def render(
        self,
        K: NDArray[Any],
        cam_from_world: NDArray[Any],
        size_hw: tuple[int, int],
        normals: bool = False,
        lights: Lights = FIXED_LIGHT,
    ) -> Rendered:
        """Draw one view.

        Args:
            K: (3, 3) intrinsics in pixels, corner convention, no skew.
            cam_from_world: (4, 4) pose, OpenCV axes.
            size_hw: Height and width of the image.
            normals: Whether to return normals as well.
            lights: The light.

        Returns:
            The view.
        """
        ...

    def close(self) -> None:
        """Free what the renderer holds."""
        ...


class Choice(NamedTuple):
    """A renderer that works here, and why it was taken.

    Attributes:
        name: "pyrender", "embree" or "cycles".
        reason: A clause for the user.
    """

    name: Literal["pyrender", "embree", "cycles"]
    reason: str


def choose_renderer(name: str = "auto", cycles: CyclesOptions | None = None) -> Choice:
    """Decide which renderer to use; "auto" tries pyrender on EGL, then embree.

    Args:
        name: What the user asked for.
        cycles: Settings of cycles, which may name its interpreter.

    Returns:
        The renderer and the reason.

    Raises:
        RenderError: The name is unknown or that renderer does not work here.
    """
    if name not in RENDERERS:
        known = ", ".join(RENDERERS)
        raise RenderError(f"renderer {name!r} is not one of {known}.{suggest(name, RENDERERS)}")
    if name == "cycles":
        from data_prep.renderers.cycles import CyclesOptions, unavailable

        problem = unavailable(cycles or CyclesOptions())
        if problem:
            raise RenderError(f"cycles does not work here: {problem}")
        return Choice("cycles", "asked for")
    problem = ""
    if name in ("auto", "pyrender"):
        from data_prep.renderers import pyrender_

        problem = pyrender_.unavailable()
        if not problem:
            reason = "asked for" if name == "pyrender" else f"EGL works ({pyrender_.device()})"
            return Choice("pyrender", reason)
        if name == "pyrender":
            raise RenderError(f"pyrender does not work here: {problem}; use --renderer embree")
    from data_prep.renderers import embree

    missing = embree.unavailable()
    if missing:
        raise RenderError(f"no renderer works here: {'; '.join(filter(None, [problem, missing]))}")
    return Choice("embree", "asked for" if name == "embree" else f"pyrender is out: {problem}")


def open_renderer(name: str, mesh: Mesh, cycles: CyclesOptions | None = None) -> Renderer:
    """Make a renderer of a mesh.

    Args:
        name: "auto", "pyrender", "embree" or "cycles".
        mesh: What it draws.
        cycles: Settings of cycles.

    Returns:
        The renderer; close it after use.

    Raises:
        RenderError: See `choose_renderer`.
    """
    chosen = choose_renderer(name, cycles).name
    if chosen == "cycles":
        from data_prep.renderers.cycles import CyclesRenderer

        return CyclesRenderer(mesh, cycles)
    if chosen == "pyrender":
        from data_prep.renderers.pyrender_ import PyrenderRenderer

        return PyrenderRenderer(mesh)
    from data_prep.renderers.embree import EmbreeRenderer

    return EmbreeRenderer(mesh)
