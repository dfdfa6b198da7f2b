"""The OpenGL half of the pyrender renderer: import it only after PYOPENGL_PLATFORM is set.

It relies on the internals of pyrender 0.1.45, its last release: three methods of its Renderer are
replaced (framebuffer, shaders, one more uniform).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyrender
from numpy.typing import NDArray
from OpenGL import GL
from pyrender.constants import RenderFlags
from pyrender.platforms import egl
from pyrender.renderer import Renderer
from pyrender.shader_program import ShaderProgram

from data_prep.renderers.glsl import FRAGMENT, VERTEX
from data_prep.renderers.lights import FIXED_LIGHT, Lights

_FLAGS = RenderFlags.RGBA | RenderFlags.SKIP_CULL_FACES | RenderFlags.OFFSCREEN


class _Program(ShaderProgram):  # type: ignore[misc]
    """Takes GLSL from strings instead of pyrender's files."""

    def _load(self, source: str) -> str:
        return source


class _Renderer(Renderer):  # type: ignore[misc]
    """Pyrender's renderer without multisampling and with our shaders."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self._main_fb: Any = None
        self._main_fb_dims: tuple[Any, Any] = (None, None)
        self.program = _Program(VERTEX, FRAGMENT)
        self.lights: Lights | None = FIXED_LIGHT

    def _configure_main_framebuffer(self) -> None:
        """Keep one framebuffer as large as the largest picture so far."""
        have = self._main_fb_dims
        if self._main_fb is not None and (
            have[0] >= self.viewport_width and have[1] >= self.viewport_height
        ):
            return
        self._delete_main_framebuffer()
        size = (max(have[0] or 0, self.viewport_width), max(have[1] or 0, self.viewport_height))
        self._main_cb, self._main_db = GL.glGenRenderbuffers(2)
        self._main_fb = self._main_fb_ms = GL.glGenFramebuffers(1)
        GL.glBindFramebuffer(GL.GL_FRAMEBUFFER, self._main_fb)
        for buffer, kind, place in (
            (self._main_cb, GL.GL_RGBA8, GL.GL_COLOR_ATTACHMENT0),
            (self._main_db, GL.GL_DEPTH_COMPONENT24, GL.GL_DEPTH_ATTACHMENT),
        ):
            GL.glBindRenderbuffer(GL.GL_RENDERBUFFER, buffer)
            GL.glRenderbufferStorage(GL.GL_RENDERBUFFER, kind, *size)
            GL.glFramebufferRenderbuffer(GL.GL_FRAMEBUFFER, place, GL.GL_RENDERBUFFER, buffer)
        if GL.glCheckFramebufferStatus(GL.GL_FRAMEBUFFER) != GL.GL_FRAMEBUFFER_COMPLETE:
            raise RuntimeError(f"the driver refuses a framebuffer of {size[0]}x{size[1]}")
        self._main_fb_dims = size

    def _delete_main_framebuffer(self) -> None:
        if self._main_fb is not None:
            GL.glDeleteFramebuffers(1, [self._main_fb])
            GL.glDeleteRenderbuffers(2, [self._main_cb, self._main_db])
        self._main_fb = self._main_fb_ms = self._main_cb = self._main_db = None

    def _get_primitive_program(self, primitive: Any, flags: int, program_flags: int) -> Any:
        if not self.program._in_context():
            self.program._add_to_context()
        return self.program

    def _bind_lighting(self, scene: Any, program: Any, node: Any, flags: int) -> None:
        """Do nothing: the light is in the shader."""

    def _bind_and_draw_primitive(self, primitive: Any, pose: Any, program: Any, flags: int) -> None:
        program.set_uniform("cutoff", float(primitive.cutoff))
        program.set_uniform("show_normals", self.lights is None)
        if self.lights is not None:
            program.set_uniform("ambient", self.lights.ambient)
            program.set_uniform("head", self.lights.head)
            program.set_uniform("num_lights", len(self.lights.places))
            for i, (place, color) in enumerate(
                zip(self.lights.places, self.lights.colors, strict=True)
            ):
                program.set_uniform(f"light_places[{i}]", place)
                program.set_uniform(f"light_colors[{i}]", color)
        super()._bind_and_draw_primitive(primitive, pose, program, flags)

    def _read_main_framebuffer(self, scene: Any, flags: int) -> tuple[NDArray[Any], NDArray[Any]]:
        w, h = self.viewport_width, self.viewport_height
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, self._main_fb)
        raw = GL.glReadPixels(0, 0, w, h, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE)
        color = np.frombuffer(raw, np.uint8).reshape(h, w, 4)[::-1]
        raw = GL.glReadPixels(0, 0, w, h, GL.GL_DEPTH_COMPONENT, GL.GL_FLOAT)
        return color, np.frombuffer(raw, np.float32).reshape(h, w)[::-1]


class Context:
    """One EGL context and the renderer in it.

    Attributes:
        device: GL_RENDERER.
    """

    def __init__(self) -> None:
        self._platform = _open_platform()
        self._renderer = _Renderer()
        self.device = GL.glGetString(GL.GL_RENDERER).decode()

    def draw(
        self, scene: Any, size_hw: tuple[int, int], lights: Lights | None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Draw a scene.

        Args:
            scene: A pyrender scene with a camera.
            size_hw: Size of the picture.
            lights: The light; None draws normals instead of colour.

        Returns:
            (H, W, 4) uint8 and (H, W) float32 window depth in [0, 1] with 1 for the background;
            top row first.
        """
        self._platform.make_current()
        self._renderer.viewport_height, self._renderer.viewport_width = size_hw
        self._renderer.lights = lights
        color, depth = self._renderer.render(scene, _FLAGS)
        return color, depth

    def free(self) -> None:
        """Delete the buffers and textures of the last scene."""
        self._platform.make_current()
        self._renderer._update_context(pyrender.Scene(), _FLAGS)


def _open_platform() -> Any:
    """Open the device EGL_DEVICE_ID, or the first that works."""
    wanted = os.environ.get("EGL_DEVICE_ID")
    if wanted is not None:
        candidates = [egl.get_device_by_index(int(wanted))]
    elif egl._eglQueryDevicesEXT is None:
        candidates = [egl.get_default_device()]
    else:
        candidates = egl.query_devices()
    problem: Exception = RuntimeError("EGL finds no device")
    for candidate in candidates:
        platform = egl.EGLPlatform(16, 16, device=candidate)
        try:
            platform.init_context()
            platform.make_current()
        except Exception as error:  # asserts and ctypes errors of PyOpenGL
            problem = error
            continue
        return platform
    raise problem
