"""Programs of torch.export: dense features and features at points, run by torch alone.

With AOTInductor they are compiled to machine code too, which C++ can load without Python.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from equifeat._version import __version__
from equifeat.checkpoint import PIXEL_CONVENTION, load_model, read_config
from equifeat.errors import ExportError
from equifeat.export.foreign import check_out
from equifeat.export.graph import Dynamic, check_dynamic, keypoint_graph
from equifeat.export.half import to_half
from equifeat.export.program_readme import program_readme
from equifeat.files import atomic_folder
from equifeat.geometry.pixels import SizeHW
from equifeat.model.extractor import FeatureExtractor
from equifeat.progress import progress

FORMAT, VERSION = "equifeat-torch-export", 1
CONFIG, CARD = "config.json", "README.md"
DENSE, KEYPOINTS = "dense", "keypoints"
# Largest difference, as a part of the largest feature, that an export may have.
_LIMITS = {"float32": 1e-3, "float16": 3e-2}
# torch.export takes a size of 1 for a constant, so that free sizes begin at 2 patches.
_LEAST_PATCHES = 2


class Plan(NamedTuple):
    """What is asked for, checked.

    Attributes:
        size_hw: Fixed height and width, or None.
        dynamic: What may change from call to call.
        half: Compute in float16.
        aoti: Compile with AOTInductor.
        patch: Side of a patch in pixels.
    """

    size_hw: SizeHW | None
    dynamic: Dynamic
    half: bool
    aoti: bool
    patch: int


def export_program(
    folder: str | Path,
    out: str | Path,
    *,
    size_hw: SizeHW | None = None,
    dynamic: Dynamic = "none",
    half: bool = False,
    aoti: bool = False,
    weights: str | None = None,
) -> str:
    """Write a model's graphs as torch.export programs, load them again and compare.

    Args:
        folder: The model folder.
        out: A new folder, for dense.pt2, keypoints.pt2, config.json and README.md; with aoti also
            dense_aoti.pt2 and keypoints_aoti.pt2.
        size_hw: Height and width of the images; None for the size that the backbone was trained
            on. Not with dynamic="size".
        dynamic: What may change from call to call: "none", "batch", or "size" (batch and size, of
            whole patches, at least 2 × 2). The number of points may always change.
        half: Compute attention, MLPs and head in float16; images and features stay float32.
        aoti: Compile with AOTInductor too, for the GPU if there is one, else for the CPU.
        weights: Another place to take the backbone's weights from: "hub", "packaged" or a file.

    Returns:
        What was written and the largest differences that were measured.

    Raises:
        ExportError: An option makes no sense, there is no C++ compiler for aoti, the model cannot
            be traced, or what was written does not give the model's features.
        CheckpointError: The folder is not a model folder.
    """
    folder, out = Path(folder), Path(out)
    check_out(out)
    check_dynamic(dynamic, size_hw)
    if aoti:
        _need_compiler()
    config = read_config(folder)
    model = load_model(folder, weights=weights)
    if dynamic != "size" and size_hw is None:
        size_hw = model.backbone.native_hw
    plan = Plan(size_hw, dynamic, half, aoti, model.patch_size)
    kinds = [("torch.export", "", torch.device("cpu"))]
    if aoti:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kinds.append((f"AOTInductor on {device.type}", "_aoti", device))
    with atomic_folder(out) as new:
        differences: dict[str, dict[str, float]] = {}
        for title, suffix, device in progress(kinds, "Exporting"):
            differences[title] = _write(model.to(device), plan, new, suffix)
        _check(differences, plan)
        facts = _config(model, config, plan, differences)
        (new / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (new / CARD).write_text(program_readme(out.name, facts), encoding="utf-8")
    found = "; ".join(
        f"{title}: {worst[DENSE]:.1e} (features), {worst[KEYPOINTS]:.1e} (descriptors)"
        for title, worst in differences.items()
    )
    return (
        f"wrote {out} ({_sizes(plan)}, {'float16' if half else 'float32'}). Largest difference "
        f"from the model, as a part of the largest feature, over {len(_cases(plan))} inputs: "
        f"{found}."
    )


def _write(model: FeatureExtractor, plan: Plan, folder: Path, suffix: str) -> dict[str, float]:
    """Write both graphs, read them again and return the largest difference of each."""
    points = keypoint_graph(model, plan.size_hw)
    if plan.half:
        to_half(points.dense)
    device = model.backbone.device
    worst: dict[str, float] = {}
    for name, graph in ((DENSE, points.dense), (KEYPOINTS, points)):
        program = _trace(graph, name, plan, device)
        path = folder / f"{name}{suffix}.pt2"
        run = _compile(program, path) if suffix else _save(program, path)
        worst[name] = max(_differences(model, name, run, plan))
    return worst


def _trace(graph: nn.Module, name: str, plan: Plan, device: torch.device) -> ExportedProgram:
    """Trace a graph with the free sizes of the plan."""
    batch = 1 if plan.dynamic == "none" else 2
    height, width = plan.size_hw or (3 * plan.patch, 4 * plan.patch)
    inputs: tuple[Tensor, ...] = (torch.zeros(batch, 3, height, width, device=device),)
    free: dict[int, Any] = {} if plan.dynamic == "none" else {0: Dim("batch", min=1)}
    shapes: list[dict[int, Any]] = [dict(free)]
    if plan.dynamic == "size":
        shapes[0][2] = plan.patch * Dim("rows", min=_LEAST_PATCHES)
        shapes[0][3] = plan.patch * Dim("columns", min=_LEAST_PATCHES)
    if name == KEYPOINTS:
        inputs = (*inputs, torch.zeros(batch, 5, 2, device=device))
        shapes.append(free | {1: Dim("points")})
    try:
        with torch.no_grad():
            return torch.export.export(graph, inputs, dynamic_shapes=tuple(shapes), strict=False)
    except Exception as error:  # torch.export raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ExportError(
            f"torch.export cannot trace {name} with dynamic {plan.dynamic!r}: {reason}"
        ) from error


def _save(program: ExportedProgram, path: Path) -> Callable[..., Tensor]:
    """Save a program without its example inputs, and load it again."""
    # They would be megabytes of zeros in a pickle.
    program.example_inputs = None
    with warnings.catch_warnings():
        # torch saves the whole of a tensor and a view of it once; the views are read back right.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, path)
    return torch.export.load(path).module()


def _compile(program: ExportedProgram, path: Path) -> Callable[..., Tensor]:
    """Compile a program with AOTInductor, and load it again."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    try:
        aoti_compile_and_package(program, package_path=str(path))
        return aoti_load_package(str(path))
    except Exception as error:  # of the compiler, of torch
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"AOTInductor cannot compile {path.name}: {lines[0][:300]}") from error


def _need_compiler() -> None:
    """Raise before any work when there is no C++ compiler."""
    asked = os.environ.get("CXX", "").split()
    wanted = asked[:1] or (["clang++"] if sys.platform == "darwin" else ["g++"])
    if shutil.which(wanted[0]) is None:
        raise ExportError(
            f"AOTInductor needs the C++ compiler {wanted[0]!r}, which is not on PATH: install it, "
            "name another one in the variable CXX, or export without aoti"
        )


def _cases(plan: Plan) -> list[tuple[int, SizeHW, int]]:
    """Batch, size and number of points of each input that is compared."""
    if plan.size_hw is not None:
        batches = (1, 1) if plan.dynamic == "none" else (1, 3)
        return [(batches[0], plan.size_hw, 1), (batches[1], plan.size_hw, 64)]
    p = plan.patch
    return [(1, (2 * p, 9 * p), 1), (3, (8 * p, 5 * p), 64), (2, (16 * p, 16 * p), 2)]


def _differences(
    model: FeatureExtractor, name: str, run: Callable[..., Tensor], plan: Plan
) -> Iterator[float]:
    """Yield the largest difference for each case, as a part of the largest feature."""
    generator = torch.Generator().manual_seed(0)
    device = model.backbone.device
    for batch, (height, width), count in _cases(plan):
        images = torch.rand(batch, 3, height, width, generator=generator).to(device)
        sides = torch.tensor([width, height])
        keypoints = (torch.rand(batch, count, 2, generator=generator) * sides).to(device)
        with torch.no_grad():
            if name == DENSE:
                found, expected = run(images), model.dense(images).features
            else:
                found, expected = run(images, keypoints), model.at(images, keypoints)
        if found.shape != expected.shape:
            raise ExportError(
                f"{name}.pt2 gives the shape {tuple(found.shape)} instead of "
                f"{tuple(expected.shape)} for {batch} images of {height} × {width}"
            )
        yield float((found - expected).abs().max() / expected.abs().max())


def _check(differences: dict[str, dict[str, float]], plan: Plan) -> None:
    """Raise when an export does not give the model's features."""
    limit = _LIMITS["float16" if plan.half else "float32"]
    for title, worst in differences.items():
        for name, value in worst.items():
            if not value <= limit:  # NaN too
                raise ExportError(
                    f"{name} of {title} differs by {value:.1e} of the largest feature from the "
                    f"model, more than {limit:g}: nothing was written"
                    + ("; export it without half" if plan.half else "")
                )


def _sizes(plan: Plan) -> str:
    if plan.size_hw is None:
        return f"any batch, any size of at least 2 × 2 whole patches of {plan.patch} pixels"
    batch = "batch 1" if plan.dynamic == "none" else "any batch"
    return f"{batch}, images of {plan.size_hw[0]} × {plan.size_hw[1]} pixels"


def _config(
    model: FeatureExtractor,
    config: dict[str, Any],
    plan: Plan,
    differences: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Return the content of config.json."""
    backbone = config["backbone"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "equifeat": __version__,
        "torch": str(torch.__version__),
        "programs": {
            title: {name: f"{name}{'' if title == 'torch.export' else '_aoti'}.pt2" for name in one}
            for title, one in differences.items()
        },
        "compute": "float16" if plan.half else "float32",
        "images": {
            "layout": "(batch, 3, height, width), float32, RGB in [0, 1], not normalised",
            "batch": 1 if plan.dynamic == "none" else "any",
            "height": plan.size_hw[0] if plan.size_hw else f"multiple of {plan.patch}",
            "width": plan.size_hw[1] if plan.size_hw else f"multiple of {plan.patch}",
            "smallest_side": 1 if plan.size_hw else _LEAST_PATCHES * plan.patch,
        },
        "keypoints": {"layout": "(batch, points, 2), float32", "xy": PIXEL_CONVENTION},
        "outputs": {
            DENSE: "(batch, dim, rows, columns), float32, not normalised",
            KEYPOINTS: "(batch, points, dim), float32, L2-normalised",
        },
        "dim": model.dim,
        "patch_size": plan.patch,
        "backbone": {"name": backbone["name"], "sha256": backbone["sha256"]},
        "largest_difference": differences,
    }
