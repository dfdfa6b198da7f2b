"""The command `equifeat export`: which format takes which options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast, get_args

from equifeat.checkpoint import read_config
from equifeat.errors import ExportError
from equifeat.export.graph import Dynamic

Format = Literal["timm", "peft", "transformers", "onnx", "torch-export", "hub"]

_GRAPH = {"height", "width", "dynamic", "half", "weights"}
# Options that a format takes, beside --out.
_OPTIONS: dict[Format, set[str]] = {
    "timm": {"height", "width", "weights"},
    "peft": {"weights"},
    "transformers": {"height", "width", "weights"},
    "onnx": _GRAPH,
    "torch-export": _GRAPH | {"aoti"},
    "hub": {"repo", "results", "private", "revision", "message", "weights"},
}


def export_command(
    folder: str,
    to: Format,
    out: Path | None = None,
    height: int | None = None,
    width: int | None = None,
    dynamic: Dynamic = "none",
    half: bool = False,
    aoti: bool = False,
    repo: str | None = None,
    results: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    weights: str | None = None,
) -> str:
    """Write a model folder in the format of another tool, and check what was written.

    Args:
        folder: The model folder.
        to: timm, peft, transformers, onnx, torch-export or hub.
        out: Folder to write to; a new one.
        height: Height of the images in pixels (timm, onnx, torch-export, transformers).
        width: Their width; the height when it is left out.
        dynamic: What may change from call to call: nothing, the batch, or batch, height and width.
        half: Compute in float16 (onnx, torch-export).
        aoti: Also compile the program with AOTInductor (torch-export).
        repo: Repository on the hub, USER/NAME; without it the folder is only written to --out.
        results: results.json of an evaluation with --controls, for the model card; without it the
            folder's own results are kept (hub).
        private: Make the repository private, when it is made (hub).
        revision: Branch of the repository to push to (hub).
        message: Message of the commit (hub).
        weights: Another place to take the backbone's weights from: hub, packaged or a file.

    Returns:
        What was written, and how far it is from the model's own features.

    Raises:
        ExportError: An option does not belong to the format, or the model cannot be written in it.
        CheckpointError: The folder is not a model folder.
    """
    given = {
        "height": height,
        "width": width,
        "dynamic": None if dynamic == "none" else dynamic,
        "half": half or None,
        "aoti": aoti or None,
        "repo": repo,
        "results": results,
        "private": private or None,
        "revision": revision,
        "message": message,
        "weights": weights,
    }
    _check(to, {name for name, value in given.items() if value is not None}, out, repo)
    model = Path(folder)
    read_config(model)
    size_hw = _size(height, width)
    if to == "hub":
        from equifeat.export.hub import push, write_hub_folder

        if repo is None:
            return write_hub_folder(model, cast(Path, out), results=results, weights=weights)
        return push(
            model,
            repo,
            private=private or None,
            results=results,
            revision=revision,
            message=message,
            weights=weights,
        )
    out = cast(Path, out)
    if to == "timm":
        from equifeat.export.timm_ import export_timm

        return export_timm(model, out, weights, size_hw=size_hw)
    if to == "peft":
        from equifeat.export.peft_ import export_peft

        return export_peft(model, out, weights)
    if to == "transformers":
        from equifeat.export.transformers_ import export_transformers

        return export_transformers(model, out, weights, size_hw=size_hw)
    if to == "onnx":
        from equifeat.export.onnx_ import export_onnx

        return export_onnx(model, out, size_hw=size_hw, dynamic=dynamic, half=half, weights=weights)
    from equifeat.export.program import export_program

    return export_program(
        model, out, size_hw=size_hw, dynamic=dynamic, half=half, aoti=aoti, weights=weights
    )


def _check(to: Format, given: set[str], out: Path | None, repo: str | None) -> None:
    """Refuse options that the format would ignore."""
    wrong = sorted(given - _OPTIONS[to])
    if wrong:
        takers = [name for name in get_args(Format) if wrong[0] in _OPTIONS[name]]
        raise ExportError(
            f"--{wrong[0]} is not an option of --to {to}, only of {', '.join(takers)}: leave it out"
        )
    if to == "hub" and (repo is None) == (out is None):
        raise ExportError(
            "--to hub takes either --repo USER/NAME, which uploads, or --out FOLDER, which only "
            "writes what would be uploaded"
        )
    if to != "hub" and out is None:
        raise ExportError(f"--to {to} needs --out, the folder to write")


def _size(height: int | None, width: int | None) -> tuple[int, int] | None:
    if height is None and width is None:
        return None
    if height is None:
        raise ExportError(f"--width {width} needs --height too")
    size_hw = (height, height if width is None else width)
    if min(size_hw) < 1:
        raise ExportError(f"--height and --width must be at least 1 pixel, not {size_hw}")
    return size_hw
