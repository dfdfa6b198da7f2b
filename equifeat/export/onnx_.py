"""A model folder as ONNX graphs: raw dense features, and descriptors at points."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from equifeat._version import __version__
from equifeat.checkpoint import PIXEL_CONVENTION, load_model
from equifeat.errors import ExportError, import_extra
from equifeat.export.foreign import check_out, facts
from equifeat.export.graph import Dynamic, KeypointGraph, check_dynamic, keypoint_graph
from equifeat.export.half import to_half
from equifeat.export.onnx_check import DENSE, KEYPOINTS, Case, compare
from equifeat.export.onnx_readme import readme
from equifeat.files import atomic_folder, sha256_of
from equifeat.geometry.pixels import SizeHW
from equifeat.model.extractor import FeatureExtractor

FORMAT = "equifeat-onnx"
VERSION = 1
OPSET = 18  # the lowest that torch's exporter writes without converting
_PURPOSE = "ONNX export"
# A protobuf holds 2 GB at most; above this the weights go to NAME.data beside the graph.
_INSIDE_BELOW = 1_800_000_000
_IMAGES = "RGB in [0, 1], float32; the normalisation with mean and std is inside"
# What a free size is traced at: no two numbers equal, so that none is taken for another.
_TRACED_GRID, _TRACED_BATCH, _TRACED_POINTS = (4, 6), 2, 5


class _Plan(NamedTuple):
    """What the graphs take."""

    dynamic: Dynamic
    size_hw: SizeHW | None
    points: int | None
    half: bool


def export_onnx(
    folder: str | Path,
    out: str | Path,
    *,
    size_hw: SizeHW | None = None,
    dynamic: Dynamic = "none",
    keypoints: int | None = None,
    half: bool = False,
    weights: str | None = None,
    check: bool = True,
) -> str:
    """Write dense.onnx, keypoints.onnx, config.json and README.md; run them and compare.

    Args:
        folder: The model folder.
        out: Where to write; a new folder.
        size_hw: Height and width of the images, any: they are resized to whole patches inside.
            None is the size the ViT was trained at.
        dynamic: What may change from call to call: "none" (one image of one size), "batch", or
            "size" (the batch, and height and width in whole patches).
        keypoints: Points an image; None for any number.
        half: Compute in float16; inputs and outputs stay float32.
        weights: Another place to take the backbone's weights from.
        check: Run both graphs in onnxruntime and compare them with the model.

    Returns:
        What was written and how far it is from the model, in two sentences.

    Raises:
        ExportError: The folder is there already, options contradict each other, the ViT has no
            such graph, or the graphs give other features than the model.
        CheckpointError: The model folder is wrong.
        WeightsError: The backbone's weights cannot be had.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    out = Path(out)
    check_out(out)
    check_dynamic(dynamic, size_hw)
    if keypoints is not None and keypoints < 1:
        raise ExportError(f"keypoints must be 1 or more points an image, not {keypoints}")
    for package in ("onnx", "onnxscript", *(("onnxruntime",) if check else ())):
        import_extra(package, "onnx", _PURPOSE)
    extractor = load_model(folder, weights=weights)
    if dynamic != "size" and size_hw is None:
        size_hw = extractor.backbone.native_hw
    plan = _Plan(dynamic, size_hw, keypoints, half)
    graph = keypoint_graph(extractor, size_hw)
    if half:
        to_half(graph.dense)
    program = _traced(graph, plan)
    with atomic_folder(out) as new:
        config = _config(extractor, plan)
        config["files"] = _write(program, new, config)
        del program
        config["check"] = compare(new, extractor, _cases(extractor, plan), half) if check else None
        text = json.dumps(config, indent=2)
        (new / "config.json").write_text(text + "\n", encoding="utf-8")
        (new / "README.md").write_text(readme(config), encoding="utf-8")
    return _sentences(out, config)


class _Both(nn.Module):
    """One trace for both files, so that the ViT is traced once."""

    def __init__(self, graph: KeypointGraph) -> None:
        super().__init__()
        self.points = graph  # "graph" is an attribute of what torch.export makes of it

    def forward(self, images: Tensor, keypoints: Tensor) -> tuple[Tensor, Tensor]:
        return self.points.both(images, keypoints)


def _traced(graph: KeypointGraph, plan: _Plan) -> Any:
    """Return torch's ONNXProgram of both outputs."""
    p = graph.dense.patch_size
    height, width = plan.size_hw or (_TRACED_GRID[0] * p, _TRACED_GRID[1] * p)
    batch = 1 if plan.dynamic == "none" else _TRACED_BATCH
    points = plan.points or _TRACED_POINTS
    free: dict[str, dict[int, Any]] = {"images": {}, "keypoints": {}}
    if plan.dynamic != "none":
        free["images"][0] = free["keypoints"][0] = Dim("batch")
    if plan.dynamic == "size":
        free["images"] |= {2: p * Dim("rows"), 3: p * Dim("columns")}
    if plan.points is None:
        free["keypoints"][1] = Dim("points")
    example = (
        torch.rand(batch, 3, height, width),
        torch.rand(batch, points, 2) * min(height, width),
    )
    try:
        # torch warns of axes that share a name, and of its own deprecations.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Both(graph).eval(),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images", "keypoints"],
                output_names=["features", "descriptors"],
                dynamic_shapes=free,
                verbose=False,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the exporter passes on whatever its steps raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line for line in str(cause).splitlines() if line.strip()]
        reason = (lines or [type(cause).__name__])[0][:200]
        raise ExportError(f"torch.onnx cannot export this ViT: {reason}") from error
    assert program is not None
    return program


def _write(program: Any, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write both files; return what config.json says of them."""
    model = program.model
    passes = import_extra("onnxscript.ir.passes.common", "onnx", _PURPOSE)
    # Every node carries the paths and lines of this machine's Python.
    passes.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "equifeat", __version__
    (images, keypoints), (features, descriptors) = model.graph.inputs, model.graph.outputs
    _keep(model.graph, [images, keypoints], [descriptors])
    at = _save(program, folder / KEYPOINTS, config)
    # What makes descriptors must be gone before their input can be.
    _keep(model.graph, [images, keypoints], [features])
    passes.RemoveUnusedNodesPass()(model)
    _keep(model.graph, [images], [features])
    return {DENSE: _save(program, folder / DENSE, config), KEYPOINTS: at}


def _keep(graph: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Let a graph have some of its inputs and outputs only."""
    for ports, kept in ((graph.inputs, inputs), (graph.outputs, outputs)):
        ports.clear()
        ports.extend(kept)


def _save(program: Any, path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write one file and check that it is well formed."""
    model = program.model
    said = {key: config[key] for key in ("precision", "dynamic", "sizes", "pixel_convention")}
    model.metadata_props.update(
        {
            "equifeat": __version__,
            "backbone": config["model"]["backbone"]["name"],
            "backbone_sha256": config["model"]["backbone"]["sha256"],
            "images": _IMAGES,
            **said,
        }
    )
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    program.save(path, external_data=size > _INSIDE_BELOW)
    onnx = import_extra("onnx", "onnx", _PURPOSE)
    onnx.checker.check_model(str(path), full_check=True)
    entry: dict[str, Any] = {
        "inputs": [_port(value) for value in model.graph.inputs],
        "outputs": [_port(value) for value in model.graph.outputs],
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
    }
    data = path.with_name(path.name + ".data")
    if data.exists():
        entry["weights"] = {
            "file": data.name,
            "sha256": sha256_of(data),
            "bytes": data.stat().st_size,
        }
    return entry


def _port(value: Any) -> dict[str, Any]:
    shape = [n if isinstance(n, int) else n.value for n in value.shape]
    return {"name": value.name, "type": "float32", "shape": shape}


def _config(extractor: FeatureExtractor, plan: _Plan) -> dict[str, Any]:
    """Return config.json but for the files and the check."""
    p, size_hw = extractor.patch_size, plan.size_hw
    if size_hw is None:
        sizes = f"any height and width that are multiples of {p}"
    else:
        h, w = extractor.grid_hw(size_hw)
        sizes = f"{size_hw[0]} x {size_hw[1]} pixels (height x width) only"
        if (h * p, w * p) != tuple(size_hw):
            sizes += f", resized to {h * p} x {w * p} inside"
    packages = ("torch", "onnx", "onnxscript", "timm")
    return {
        "format": FORMAT,
        "version": VERSION,
        "opset": OPSET,
        "precision": "float16" if plan.half else "float32",
        "dynamic": plan.dynamic,
        "size_hw": None if size_hw is None else list(size_hw),
        "grid_hw": None if size_hw is None else list(extractor.grid_hw(size_hw)),
        "sizes": sizes,
        "batch": 1 if plan.dynamic == "none" else "any",
        "points": "any" if plan.points is None else plan.points,
        "images": _IMAGES,
        "pixel_convention": PIXEL_CONVENTION,
        "model": facts(extractor, size_hw),
        "made_with": {name: importlib.metadata.version(name) for name in packages},
    }


def _cases(extractor: FeatureExtractor, plan: _Plan) -> list[Case]:
    """Return what to compare at: never only what was traced."""
    points = plan.points or 17
    if plan.size_hw is not None:
        second = 1 if plan.dynamic == "none" else 3
        return [Case(1, plan.size_hw, points), Case(second, plan.size_hw, plan.points or 3)]
    p = extractor.patch_size
    rows, columns = (side // p for side in extractor.backbone.native_hw)
    # Positions stretched along one side and shrunk along the other: few patches, every branch.
    tall, wide = ((rows + 3) * p, 3 * p), (2 * p, (columns + 2) * p)
    return [
        Case(1, tall, points),
        Case(3, wide, plan.points or 3),
        Case(2, (9 * p, 9 * p), points),
    ]


def _sentences(out: Path, config: dict[str, Any]) -> str:
    size = sum(
        entry["bytes"] + entry.get("weights", {}).get("bytes", 0)
        for entry in config["files"].values()
    )
    batch = "one image" if config["batch"] == 1 else "any number of images"
    text = (
        f"Wrote {out}: {DENSE} and {KEYPOINTS} ({size / 1e6:.0f} MB together, "
        f"{config['precision']}, opset {OPSET}), for {batch} of {config['sizes']}. "
    )
    check = config["check"]
    if check is None:
        return text + "They were not run."
    return text + (
        f"In onnxruntime their features differ from the model's by {check['features']:.1e} of the "
        f"largest feature, their descriptors by {check['descriptors']:.1e} (cosine "
        f"{check['cosine']:.6f} at least)."
    )
