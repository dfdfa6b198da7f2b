"""Blender with one object in it. Runs in the worker of the cycles renderer only.

The standard library, NumPy and bpy only: see `data_prep.renderers.cycles_worker`.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Studio:
    """Blender with one object in two scenes: one gives colour, the other depth and normals."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import bpy

        self._bpy = bpy
        self._mathutils: Any = importlib.import_module("mathutils")
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="equifeat_cycles_")
        self.device = self._find_device(settings["device"])
        self._scenes: dict[str, Any] = {}
        self._outputs: dict[str, list[tuple[Any, Any, Any]]] = {}

    def close(self) -> None:
        """Remove the temporary files."""
        self._folder.cleanup()

    def _find_device(self, wanted: str) -> str:
        """Switch a GPU on and return its name, or "CPU"."""
        if wanted == "cpu":
            return "CPU"
        preferences = self._bpy.context.preferences.addons["cycles"].preferences
        for kind in ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI"):
            try:
                preferences.compute_device_type = kind
                preferences.get_devices()
            except TypeError:  # this build lacks the kind
                continue
            found = [d for d in preferences.devices if d.type == kind]
            if found:
                # one worker, one GPU: the others belong to other workers
                for device in preferences.devices:
                    device.use = device == found[0]
                return f"{found[0].name} ({kind})"
        raise RuntimeError("Cycles finds no GPU here; give --cycles_device cpu")

    def load(self, header: dict[str, Any], arrays: dict[str, Array]) -> None:
        """Replace the object.

        Args:
            header: "parts", one dictionary a primitive.
            arrays: Their arrays, named by index.
        """
        # also forgets all data and rendering sessions of the last object
        self._bpy.ops.wm.read_factory_settings(use_empty=True)
        self.device = self._find_device(self._settings["device"])
        self._scenes = {name: self._scene(name) for name in ("color", "data")}
        self._outputs = {"depth": [], "normal": []}
        images: dict[int, Any] = {}
        for i, part in enumerate(header["parts"]):
            mesh = self._mesh(i, arrays)
            texture = part["texture"]
            if texture is not None and texture not in images:
                images[texture] = self._image(arrays[f"texture{texture}"])
            image = images.get(texture) if f"uv{i}" in arrays else None
            has_colors = f"colors{i}" in arrays
            for name, scene in self._scenes.items():
                thing = self._bpy.data.objects.new(f"{name}{i}", mesh)
                scene.collection.objects.link(thing)
                material = self._material(name, part, image, has_colors)
                if not mesh.materials:
                    mesh.materials.append(None)
                thing.material_slots[0].link = "OBJECT"
                thing.material_slots[0].material = material

    def _scene(self, name: str) -> Any:
        bpy = self._bpy
        scene = bpy.data.scenes.new(name)
        render, cycles = scene.render, scene.cycles
        render.engine = "CYCLES"
        cycles.device = "CPU" if self.device == "CPU" else "GPU"
        render.film_transparent = True
        render.use_persistent_data = True
        render.resolution_percentage = 100
        render.dither_intensity = 0.0
        render.use_compositing = render.use_sequencer = False
        render.threads_mode = "FIXED" if self._settings["threads"] else "AUTO"
        if self._settings["threads"]:
            render.threads = self._settings["threads"]
        scene.display_settings.display_device = "sRGB"
        scene.view_settings.view_transform = "Standard"
        scene.view_settings.look = "None"
        cycles.transparent_max_bounces = 64
        color = name == "color"
        cycles.samples = self._settings["samples"] if color else 1
        cycles.use_adaptive_sampling = False
        cycles.use_denoising = color and self._settings["denoise"]
        cycles.denoiser = "OPENIMAGEDENOISE"
        cycles.max_bounces, cycles.diffuse_bounces, cycles.glossy_bounces = 6, 3, 2
        cycles.caustics_reflective = cycles.caustics_refractive = False
        if not color:
            # One ray through the pixel's centre. The interface stops at 0.01 px, so the stored
            # value is set. 1e-6 px is 4e-9 of the object.
            cycles.filter_width = 0.01
            stored = scene.bl_system_properties_get(do_create=True)["cycles"]
            stored["filter_width"] = 1e-6
        image = render.image_settings
        image.file_format = "PNG" if color else "OPEN_EXR"
        image.color_mode = "RGBA"
        image.color_depth = "8" if color else "32"
        if color:
            image.compression = 0
        else:
            image.exr_codec = "NONE"
        camera = bpy.data.objects.new(f"camera_{name}", bpy.data.cameras.new(name))
        scene.collection.objects.link(camera)
        scene.camera = camera
        scene.world = bpy.data.worlds.new(name)
        return scene

    def _mesh(self, i: int, arrays: dict[str, Array]) -> Any:
        points, faces = arrays[f"points{i}"], arrays[f"faces{i}"]
        mesh = self._bpy.data.meshes.new(f"part{i}")
        mesh.vertices.add(len(points))
        mesh.vertices.foreach_set("co", points.ravel())
        mesh.loops.add(faces.size)
        mesh.loops.foreach_set("vertex_index", faces.ravel())
        mesh.polygons.add(len(faces))
        mesh.polygons.foreach_set("loop_start", np.arange(0, faces.size, 3, dtype=np.int32))
        mesh.polygons.foreach_set("use_smooth", np.ones(len(faces), bool))
        mesh.update(calc_edges=True)
        # drops triangles without area and doubled ones, on which Blender might crash
        mesh.validate()
        corners = np.empty(len(mesh.loops), np.int32)
        mesh.loops.foreach_get("vertex_index", corners)
        if f"uv{i}" in arrays:
            uv = arrays[f"uv{i}"][corners] * [1.0, -1.0] + [0.0, 1.0]
            mesh.uv_layers.new(name="uv").data.foreach_set("uv", uv.astype(np.float32).ravel())
        if f"colors{i}" in arrays:
            layer = mesh.color_attributes.new("tint", "FLOAT_COLOR", "POINT")
            layer.data.foreach_set("color", arrays[f"colors{i}"].ravel())
        mesh.normals_split_custom_set_from_vertices(arrays[f"normals{i}"])
        return mesh

    def _image(self, pixels: Array) -> Any:
        height, width = pixels.shape[:2]
        image = self._bpy.data.images.new("texture", width, height, alpha=True)
        # alpha must not change the colour
        image.alpha_mode = "CHANNEL_PACKED"
        image.pixels.foreach_set((pixels[::-1].astype(np.float32) / 255.0).ravel())
        image.pack()
        return image

    def _material(self, scene: str, part: dict[str, Any], image: Any, has_colors: bool) -> Any:
        """Build nodes: albedo and alpha, then a surface, an alpha cut in front of it."""
        material = self._bpy.data.materials.new(scene)
        material.use_nodes = True
        tree = material.node_tree
        tree.nodes.clear()
        link = tree.links.new

        def node(kind: str, **values: Any) -> Any:
            made = tree.nodes.new(f"ShaderNode{kind}")
            for key, value in values.items():
                setattr(made, key, value)
            return made

        def times(a: Any, b: Any) -> Any:
            """Multiply two sockets or values; colours with colours, numbers with numbers."""
            vector = not isinstance(b, float)
            made = node("VectorMath" if vector else "Math", operation="MULTIPLY")
            for slot, value in ((0, a), (1, b)):
                if hasattr(value, "is_output"):
                    link(value, made.inputs[slot])
                else:
                    made.inputs[slot].default_value = value
            return made.outputs[0]

        factor = part["base_color"]
        albedo: Any = tuple(factor[:3])
        alpha: Any = factor[3]
        if image is not None:
            texel = node("TexImage", image=image, interpolation="Linear", extension="REPEAT")
            link(self._wrapped(node, link, part["wrap"], image), texel.inputs[0])
            albedo, alpha = times(texel.outputs["Color"], albedo), times(texel.outputs[1], alpha)
        if has_colors:
            tint = node("Attribute", attribute_name="tint")
            albedo = times(tint.outputs["Color"], albedo)
            product = node("Math", operation="MULTIPLY")
            link(tint.outputs["Alpha"], product.inputs[0])
            if hasattr(alpha, "is_output"):
                link(alpha, product.inputs[1])
            else:
                product.inputs[1].default_value = alpha
            alpha = product.outputs[0]
        if scene == "color":
            surface = node("BsdfPrincipled").outputs[0]
            inputs = surface.node.inputs
            inputs["Roughness"].default_value = 0.6
            inputs["Specular IOR Level"].default_value = 0.3
            if hasattr(albedo, "is_output"):
                link(albedo, inputs["Base Color"])
            else:
                inputs["Base Color"].default_value = (*albedo, 1.0)
        else:
            surface = node("Emission").outputs[0]
            camera = node("CameraData")
            normal = node("VectorTransform", vector_type="NORMAL")
            normal.convert_from, normal.convert_to = "WORLD", "CAMERA"
            link(node("NewGeometry").outputs["Normal"], normal.inputs[0])
            to = surface.node.inputs["Color"]
            self._outputs["depth"].append((tree, camera.outputs["View Z Depth"], to))
            # positive values only: emission below zero is dropped
            shifted = node("VectorMath", operation="ADD")
            shifted.inputs[1].default_value = (2.0, 2.0, 2.0)
            link(normal.outputs[0], shifted.inputs[0])
            self._outputs["normal"].append((tree, shifted.outputs[0], to))
        if part["cutoff"] > 0.0:
            cut = node("Math", operation="LESS_THAN")
            if hasattr(alpha, "is_output"):
                link(alpha, cut.inputs[0])
            else:
                cut.inputs[0].default_value = alpha
            cut.inputs[1].default_value = part["cutoff"]
            mix = node("MixShader")
            link(cut.outputs[0], mix.inputs[0])
            link(surface, mix.inputs[1])
            link(node("BsdfTransparent").outputs[0], mix.inputs[2])
            surface = mix.outputs[0]
        link(surface, node("OutputMaterial").inputs["Surface"])
        return material

    def _wrapped(self, node: Any, link: Any, wrap: list[str], image: Any) -> Any:
        """Return texture coordinates folded by a wrap mode along each axis."""
        uv = node("UVMap", uv_map="uv").outputs[0]
        if wrap == ["repeat", "repeat"]:
            return uv
        split, join = node("SeparateXYZ"), node("CombineXYZ")
        link(uv, split.inputs[0])
        for axis, mode in enumerate(wrap):
            out = split.outputs[axis]
            if mode == "mirror":
                fold = node("Math", operation="PINGPONG")
                fold.inputs[1].default_value = 1.0
                link(out, fold.inputs[0])
                out = fold.outputs[0]
            if mode != "repeat":
                # half a texel from the border, or the opposite border would be mixed in
                half = 0.5 / image.size[axis]
                clamp = node("Clamp")
                clamp.inputs["Min"].default_value, clamp.inputs["Max"].default_value = (
                    half,
                    1 - half,
                )
                link(out, clamp.inputs["Value"])
                out = clamp.outputs[0]
            link(out, join.inputs[axis])
        return join.outputs[0]

    def render(self, request: dict[str, Any]) -> dict[str, Array]:
        """Draw one view.

        Args:
            request: Camera, light and what is wanted.

        Returns:
            Of the window that was asked for: "color" (H, W, 4) uint8, sRGB with straight alpha;
            "depth" (H, W) float32; "normal" (H, W, 3) float32 in Blender's camera axes, if asked
            for.
        """
        for scene in self._scenes.values():
            self._aim(scene, request)
        self._light(self._scenes["color"], request["lights"])
        self._scenes["color"].cycles.seed = request["seed"]
        color = self._draw("color")
        out = {"color": (color * 255.0 + 0.5).astype(np.uint8)}
        data = self._draw("data", "depth")
        there = data[..., 3] > 0.5
        out["depth"] = np.where(there, data[..., 0], 0).astype(np.float32)
        if request["normals"]:
            normal = self._draw("data", "normal")[..., :3] - np.float32(2.0)
            out["normal"] = np.where(there[..., None], normal, 0).astype(np.float32)
        return out

    def _aim(self, scene: Any, request: dict[str, Any]) -> None:
        (h, w), (fx, fy, cx, cy) = request["size_hw"], request["K"]
        render, camera = scene.render, scene.camera
        render.resolution_x, render.resolution_y = w, h
        # only the window is drawn and denoised; a quarter of a pixel outlives the rounding down
        x0, y0, x1, y1 = request["window"]
        render.use_border = render.use_crop_to_border = True
        render.border_min_x, render.border_max_x = (x0 + 0.25) / w, min((x1 + 0.25) / w, 1.0)
        render.border_min_y = (h - y1 + 0.25) / h
        render.border_max_y = min((h - y0 + 0.25) / h, 1.0)
        # a pixel's aspect is at least 1 along both sides
        render.pixel_aspect_x = max(1.0, fy / fx)
        render.pixel_aspect_y = max(1.0, fx / fy)
        data = camera.data
        data.sensor_fit = "HORIZONTAL"
        data.sensor_width = 36.0
        data.lens = fx * data.sensor_width / w
        data.shift_x = (w / 2 - cx) / w
        data.shift_y = (cy - h / 2) / w * (fx / fy)
        data.clip_start, data.clip_end = 1e-3, 1e3
        camera.matrix_world = self._mathutils.Matrix(request["world_from_camera"])

    def _light(self, scene: Any, lights: dict[str, Any]) -> None:
        """Set the world and the lamps."""
        bpy = self._bpy
        for thing in [o for o in scene.collection.objects if o.type == "LIGHT"]:
            bpy.data.lights.remove(thing.data)
        for lamp in lights["lamps"]:
            kind = "SUN" if lamp["direction"] else "POINT"
            data = bpy.data.lights.new("lamp", kind)
            data.color, data.energy = lamp["color"], lamp["energy"]
            if lamp["direction"]:
                data.angle = 0.1
            else:
                data.shadow_soft_size = 0.1
            thing = bpy.data.objects.new("lamp", data)
            place = self._mathutils.Vector(lamp["place"])
            thing.rotation_mode = "QUATERNION"
            thing.rotation_quaternion = place.to_track_quat("Z", "Y")
            thing.location = place
            scene.collection.objects.link(thing)
        self._world(scene.world, lights)

    def _world(self, world: Any, lights: dict[str, Any]) -> None:
        world.use_nodes = True
        tree = world.node_tree
        tree.nodes.clear()
        background = tree.nodes.new("ShaderNodeBackground")
        coordinates = tree.nodes.new("ShaderNodeTexCoord")
        if lights["environment"]:
            image = self._bpy.data.images.load(lights["environment"], check_existing=True)
            pixels = np.empty(len(image.pixels), np.float32)
            image.pixels.foreach_get(pixels)
            rgb = pixels.reshape(image.size[1], image.size[0], -1)[..., :3]
            # rows near the poles cover less of the sphere
            row = np.sin((np.arange(len(rgb)) + 0.5) / len(rgb) * math.pi)
            mean = float((np.nan_to_num(rgb).mean(axis=(1, 2)) * row).sum() / row.sum())
            turn = tree.nodes.new("ShaderNodeMapping")
            turn.inputs["Rotation"].default_value = (math.pi / 2, 0.0, lights["turn"])
            source = tree.nodes.new("ShaderNodeTexEnvironment")
            source.image = image
            tree.links.new(coordinates.outputs["Generated"], turn.inputs[0])
            tree.links.new(turn.outputs[0], source.inputs[0])
            strength = lights["strength"] / max(mean, 1e-6)
        else:
            # three colours along the vertical axis, which is y here
            split = tree.nodes.new("ShaderNodeSeparateXYZ")
            place = tree.nodes.new("ShaderNodeMapRange")
            place.inputs["From Min"].default_value = -1.0
            source = tree.nodes.new("ShaderNodeValToRGB")
            top, horizon, below = lights["sky"]
            strength = max(*top, *horizon, *below, 1e-6)
            ramp = source.color_ramp
            ramp.elements.new(0.5)
            for element, rgb in zip(ramp.elements, (below, horizon, top), strict=True):
                element.color = (*(c / strength for c in rgb), 1.0)
            tree.links.new(coordinates.outputs["Generated"], split.inputs[0])
            tree.links.new(split.outputs["Y"], place.inputs["Value"])
            tree.links.new(place.outputs[0], source.inputs[0])
        background.inputs["Strength"].default_value = strength
        tree.links.new(source.outputs["Color"], background.inputs["Color"])
        output = tree.nodes.new("ShaderNodeOutputWorld")
        tree.links.new(background.outputs[0], output.inputs["Surface"])

    def _draw(self, name: str, output: str = "") -> Array:
        """Render a scene through a file, which is the only way to its pixels without a window."""
        bpy, scene = self._bpy, self._scenes[name]
        for tree, socket, to in self._outputs.get(output, []):
            tree.links.new(socket, to)
        path = Path(self._folder.name) / (f"{name}.png" if name == "color" else f"{name}.exr")
        path.unlink(missing_ok=True)
        scene.render.filepath = str(path)
        bpy.ops.render.render(write_still=True, scene=scene.name)
        image = bpy.data.images.load(str(path))
        try:
            if name != "color":
                image.colorspace_settings.name = "Non-Color"
            w, h = image.size
            pixels = np.empty(h * w * 4, np.float32)
            image.pixels.foreach_get(pixels)
        finally:
            bpy.data.images.remove(image)
        out: Array = pixels.reshape(h, w, 4)[::-1]
        return out
