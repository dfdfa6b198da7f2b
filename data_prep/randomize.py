"""Light and background of each view, drawn by seed: the same for every renderer.

What is drawn for view i of an object depends on the seed, the object's name and i alone (on seed
and name where one light serves the whole object), not on the renderer, the run or the worker.
"""

from __future__ import annotations

import colorsys
import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.backgrounds import (
    ENVIRONMENT_SUFFIXES,
    IMAGE_SUFFIXES,
    check_background,
    draw_background,
    file_record,
    folder_files,
    folder_record,
    is_folder,
)
from data_prep.renderers.lights import KEY_LIGHT, MAX_LIGHTS, Lights
from equifeat.errors import RenderError
from equifeat.seeding import numpy_generator

Array = NDArray[Any]
LightMode = Literal["fixed", "object", "view"]
LIGHT_MODES = ("fixed", "object", "view")


@dataclass(frozen=True)
class SceneOptions:
    """Light and background. The defaults are the fixed light over black.

    Args:
        light: "fixed": one light that stands still, no chance in it. "object": drawn once an
            object, so that a surface looks alike in all its views. "view": drawn for each view.
        lights: Most lights beside the camera's own and the ambient one; 1 to this many are drawn.
        light_elevation: Lowest elevation of a drawn light in degrees; −90 is from everywhere.
        light_distance: Of drawn lights from the object's centre; 0 is infinitely far.
        light_intensity: All lights together, as a share of full brightness.
        ambient: Light from all sides.
        head_light: Light at the camera.
        light_jitter: Relative change of light_intensity and ambient, 0 to below 1.
        light_saturation: Greatest saturation of the light's colours, 0 is white.
        environment: Folder of .hdr or .exr pictures for a path tracer; empty is a procedural sky.
        background: "black", "white", "#rrggbb", "color" (one drawn), "noise", "gradient" or a
            folder of images.
        seed: Seed of all of these.
    """

    light: LightMode = "fixed"
    lights: int = 1
    light_elevation: float = -90.0
    light_distance: float = 0.0
    light_intensity: float = 0.40
    ambient: float = 0.45
    head_light: float = 0.15
    light_jitter: float = 0.0
    light_saturation: float = 0.0
    environment: str = ""
    background: str = "black"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.light not in LIGHT_MODES:
            raise RenderError(f"light = {self.light!r}: give {', '.join(LIGHT_MODES)}")
        far = self.light_distance == 0.0
        checks = [
            (1 <= self.lights <= MAX_LIGHTS, "lights", f"1 to {MAX_LIGHTS}"),
            (-90.0 <= self.light_elevation <= 90.0, "light_elevation", "-90 to 90 degrees"),
            (far or 0.9 < self.light_distance < 1e3, "light_distance", "0, or 0.9 to 1000"),
            (0.0 <= self.light_intensity <= 4.0, "light_intensity", "0 to 4"),
            (0.0 <= self.ambient <= 4.0, "ambient", "0 to 4"),
            (0.0 <= self.head_light <= 4.0, "head_light", "0 to 4"),
            (0.0 <= self.light_jitter < 1.0, "light_jitter", "0 to below 1"),
            (0.0 <= self.light_saturation <= 1.0, "light_saturation", "0 to 1"),
            (self.seed >= 0, "seed", "a number from 0"),
        ]
        for ok, name, allowed in checks:
            if not ok:
                raise RenderError(f"{name} = {getattr(self, name)}: give {allowed}")
        if self.light_intensity + self.ambient + self.head_light <= 0.0:
            raise RenderError("light_intensity, ambient and head_light are all 0: no light at all")
        self._check_drawn()
        check_background(self.background)
        if self.environment:
            folder_files(self.environment, ENVIRONMENT_SUFFIXES, "environment")

    def _check_drawn(self) -> None:
        """Refuse what would be ignored without a word."""
        drawn = ("lights", "light_elevation", "light_distance", "light_jitter", "light_saturation")
        if self.light == "fixed":
            for field in dataclasses.fields(self):
                if field.name in drawn and getattr(self, field.name) != field.default:
                    raise RenderError(
                        f"{field.name} = {getattr(self, field.name)} has no effect on the fixed "
                        "light; give --light object or --light view as well"
                    )

    def record(self) -> dict[str, Any]:
        """Return what goes to views.json; folders by name and content, not by their place."""
        out = dataclasses.asdict(self)
        if is_folder(self.background):
            out["background"] = folder_record(self.background, IMAGE_SUFFIXES)
        if self.environment:
            out["environment"] = folder_record(self.environment, ENVIRONMENT_SUFFIXES)
        return out


class Scene(NamedTuple):
    """Light and background of one view.

    Attributes:
        lights: The light.
        background: (H, W, 3) uint8, or None for black.
        record: What was drawn, for views.json.
    """

    lights: Lights
    background: Array | None
    record: dict[str, Any]


def draw_scene(options: SceneOptions, name: str, view: int, size_hw: tuple[int, int]) -> Scene:
    """Draw light and background of a view.

    Args:
        options: What may happen.
        name: The object's name.
        view: Index of the view.
        size_hw: Height and width of the image.

    Returns:
        The scene.

    Raises:
        RenderError: A background image cannot be read.
    """
    # the names' hash keeps objects apart; Python's own differs from process to process
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    of_view = view + 1 if options.light == "view" else 0
    lights = _draw_lights(options, numpy_generator(options.seed, key, of_view, 0))
    record: dict[str, Any] = {"lights": lights.record()}
    if lights.environment is not None:
        record["environment"] = file_record(lights.environment)
    if options.background == "black":
        return Scene(lights, None, record)
    rng = numpy_generator(options.seed, key, view + 1, 1)
    background, record["background"] = draw_background(options.background, size_hw, rng)
    return Scene(lights, background, record)


def _draw_lights(options: SceneOptions, rng: np.random.Generator) -> Lights:
    white = np.ones(3)
    environment = None
    if options.environment:
        files = folder_files(options.environment, ENVIRONMENT_SUFFIXES, "environment")
        environment = files[int(rng.integers(len(files)))]
    if options.light == "fixed":
        return Lights(
            ambient=options.ambient * white,
            places=np.array([[*KEY_LIGHT, 0.0]]),
            colors=np.full((1, 3), options.light_intensity),
            head=options.head_light * white,
            environment=environment,
        )
    count = int(rng.integers(1, options.lights + 1))
    strength = 1.0 + options.light_jitter * rng.uniform(-1.0, 1.0, size=2)
    share = rng.uniform(0.3, 1.0, size=count)
    share *= options.light_intensity * strength[0] / share.sum()
    colors = np.stack([_color(rng, options.light_saturation) for _ in range(count)])
    low = math.sin(math.radians(options.light_elevation))
    y, turn = rng.uniform(low, 1.0, size=count), rng.uniform(0.0, 2.0 * math.pi, size=count)
    radius = np.sqrt(1.0 - y * y)
    places = np.stack(
        [radius * np.sin(turn), y, radius * np.cos(turn), np.zeros(count)], axis=1
    ) * (options.light_distance or 1.0)
    if options.light_distance:
        places[:, 3] = 1.0
    ambient = options.ambient * strength[1] * _color(rng, options.light_saturation)
    bright = rng.uniform(0.4, 1.6, size=3)
    sky = np.stack([_color(rng, options.light_saturation) for _ in range(3)])
    return Lights(
        ambient=ambient,
        places=places,
        colors=colors * share[:, None],
        head=options.head_light * white,
        sky=sky * (bright / bright.mean())[:, None],
        environment=environment,
        environment_turn=float(rng.uniform(0.0, 2.0 * math.pi)),
    )


def _color(rng: np.random.Generator, saturation: float) -> Array:
    """Return (3,) RGB with mean 1, of any hue and at most this saturation."""
    hue, amount = rng.uniform(size=2)
    rgb = np.array(colorsys.hsv_to_rgb(float(hue), float(amount) * saturation, 1.0))
    out: Array = rgb / rgb.mean()
    return out
