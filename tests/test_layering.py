"""The layers table of DESIGN.md, enforced on the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

FILES = sorted([*(ROOT / "equifeat").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])

# Every module belongs to the first layer whose prefix fits; it may import the layers named.
BASE = [
    "errors",
    "seeding",
    "_version",
    "files",
    "progress",
    "image_files",
    "video_files",
    "recipe_files",
    "ray_cluster",
]
SIBLINGS = ["data", "model", "loss", "metrics"]
MIDDLE = [*BASE, "geometry", *SIBLINGS]
# What the module is made of; it sees them, they do not see it.
STEP = [
    f"train.{name}"
    for name in (
        "objective",
        "preserve",
        "ema",
        "negatives",
        "distributed",
        "sharded",
        "precision",
        "schedule",
    )
]
TRAIN = ["train.module", "train.trunk_cache", "train.callbacks", *STEP]
UPPER = [*MIDDLE, "checkpoint", "hub", *TRAIN]
DRAW = ["draw", "draw_matches"]
TOP = [*UPPER, "eval", "options", "train", "export", *DRAW, "viz", "report"]
ALLOWED: dict[str, list[str]] = {
    "errors": [],
    "seeding": [],
    "_version": [],
    "files": ["errors"],
    "progress": ["errors"],
    "image_files": ["errors"],
    "video_files": ["errors"],
    "recipe_files": ["errors", "files"],
    "ray_cluster": [],
    "pca_colors": [],
    "options": ["errors"],
    "geometry": [*BASE, "geometry"],
    "data": [*BASE, "geometry", "data"],
    "model": [*BASE, "geometry", "model"],
    "loss": [*BASE, "geometry"],
    "metrics": [*BASE, "geometry"],
    "checkpoint": [*BASE, "geometry", "model"],
    "train.module": [*UPPER],
    **{name: [*MIDDLE, "checkpoint", *STEP] for name in STEP},
    "train.trunk_cache": [*UPPER],
    "train.callbacks": [*UPPER],
    "eval": [*MIDDLE, "checkpoint", "hub", "eval", *DRAW],
    "train.watch": [*UPPER, "eval", "draw", "viz", "train"],
    "train.watch_picture": [*MIDDLE, "eval", "draw", "viz"],
    "train": [*UPPER, "eval", "options", "train"],
    "export": [*TOP],
    "draw": [*BASE, "geometry"],
    "draw_matches": [*BASE, "geometry", "draw"],
    "viz": [*UPPER, "eval", *DRAW, "pca_colors"],
    "report": [*BASE, "draw", "viz"],
    "hub": [*BASE, "geometry", "model", "checkpoint"],
    "reference_file": [*BASE, "model"],
    "reference_checkpoint": [*BASE, "model", "reference_file"],
    "convert": [*MIDDLE, "checkpoint", "reference_checkpoint", "reference_file"],
    "downstream": [*MIDDLE, "checkpoint", "eval", *DRAW],
    "features": [*MIDDLE, "checkpoint", "eval", "options", "pca_colors"],
    "commands": [*TOP, "downstream"],
    "submit": [*TOP],
    "demo_report": [*TOP],
    "demo": [*TOP, "commands", "demo_report"],
    "eval_report": [*TOP],
    "evaluate": [*TOP, "eval_report"],
    "sweep": [*TOP, "submit", "evaluate", "sweep"],
    "cli": [*TOP, "commands", "evaluate", "demo"],
    "": [
        "_version",
        "errors",
        "checkpoint",
        "hub",
        "image_files",
        "model",
        "video_files",
    ],  # the package itself: public names
}
# The demo and the command line are the only ones above data_prep.
ABOVE_DATA_PREP = ("demo", "commands", "evaluate", "cli")
DATA_PREP_MAY = (*(f"equifeat.{name}" for name in BASE), "equifeat.geometry", "equifeat.options")
# What reads views: checking, packing and importing captures (docs/adr/005).
READS_VIEWS = (
    "data_prep.check",
    "data_prep.pack",
    "data_prep.capture",
    "data_prep.category_pairs",
)
# Methods of a model whose work is done above it (docs/adr/017).
LATE = {
    "equifeat.model.hub_mixin": {
        "equifeat.checkpoint",
        "equifeat.export.hub",
        "equifeat.hub.pretrained",
    }
}
# Large optional packages, each behind one door.
IMPORTERS = {
    "av": ("equifeat.video_files", "equifeat.features.command"),  # which asks for it early
    "onnxruntime": ("equifeat.export.onnx",),
    "onnxscript": ("equifeat.export.onnx",),
    "transformers": ("equifeat.export.transformers",),
    "zarr": ("equifeat.features",),
}
RENDERER_PACKAGES = {"pyrender", "OpenGL", "embreex", "bpy", "mathutils"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for name in node.names:
                yield f"{node.module}.{name.name}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "import_extra")
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value), node.lineno


def layer(name: str) -> str:
    """The longest key of ALLOWED that the module (without 'equifeat.') starts with."""
    fits = [key for key in ALLOWED if key and (name == key or name.startswith(f"{key}."))]
    return max(fits, key=len, default="")


def within(name: str, prefixes: list[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_down(file: Path) -> None:
    module = module_name(file)
    package, _, inner = module.partition(".")
    assert package == "data_prep" or layer(inner) or not inner, (
        f"{file.relative_to(ROOT)} is in no layer: add it to ALLOWED in {Path(__file__).name}"
    )
    wrong = []
    for name, line in imports(parse(file)):
        where = f"{file.relative_to(ROOT)}:{line} imports {name}"
        if name in LATE.get(module, ()):
            continue
        to, _, target = name.partition(".")
        may = (*DATA_PREP_MAY, "equifeat.data") if module.startswith(READS_VIEWS) else DATA_PREP_MAY
        if package == "data_prep" and to == "equifeat" and not name.startswith(may):
            wrong.append(f"{where}: data_prep sees errors, seeding and geometry only")
        if package == "equifeat" and to == "data_prep" and not inner.startswith(ABOVE_DATA_PREP):
            wrong.append(f"{where}: only the demo and the command line are above data_prep")
        if (
            package == "equifeat"
            and to == "equifeat"
            and not within(target, ALLOWED[layer(inner)])
            and layer(inner) != layer(target)
        ):
            wrong.append(f"{where}: not below {layer(inner) or 'the package'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_packages_have_one_importer(file: Path) -> None:
    module = module_name(file)
    for name, line in imports(parse(file)):
        top, where = name.split(".")[0], f"{file.relative_to(ROOT)}:{line}"
        if top == "timm":
            assert module == "equifeat.model.backbone", f"{where}: timm is for model/backbone.py"
        if top == "peft":
            assert module == "equifeat.model.adapter", f"{where}: peft is for model/adapter.py"
        if top in IMPORTERS:
            assert module.startswith(IMPORTERS[top]), f"{where}: {top} is for {IMPORTERS[top]}"
        if top in RENDERER_PACKAGES:
            assert module.startswith("data_prep.renderers"), f"{where}: {top} is for renderers/"
        if top == "trimesh":
            assert module.startswith("data_prep"), f"{where}: trimesh is for data_prep"
        assert top not in {"dill", "cloudpickle", "joblib"}, f"{where}: no pickle"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_one_caller_of_grid_sample_and_interpolate(file: Path) -> None:
    if module_name(file) == "equifeat.geometry.pixels":
        return
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Attribute) and node.attr in {"grid_sample", "interpolate"}:
            raise AssertionError(
                f"{file.relative_to(ROOT)}:{node.lineno}: only geometry/pixels.py resamples"
            )
    for name, line in imports(parse(file)):
        assert not name.endswith((".grid_sample", ".interpolate")), f"{file}:{line}"


def is_prefix_slice(node: ast.AST) -> bool:
    """x[:, 1:], also with more dimensions behind."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
        return False
    first, second = node.slice.elts[:2]
    return (
        isinstance(first, ast.Slice)
        and first.lower is None
        and first.upper is None
        and isinstance(second, ast.Slice)
        and isinstance(second.lower, ast.Constant)
        and second.lower.value == 1
        and second.upper is None
    )


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_nobody_counts_prefix_tokens_by_hand(file: Path) -> None:
    package = module_name(file)
    if not package.startswith(("equifeat.model", "equifeat.checkpoint", "equifeat.export")):
        return
    for node in ast.walk(parse(file)):
        assert not is_prefix_slice(node), (
            f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: [:, 1:] drops one token; "
            "the number of prefix tokens comes from the model"
        )


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_nothing_is_printed_evaluated_or_loaded_loosely(file: Path) -> None:
    for node in ast.walk(parse(file)):
        if not isinstance(node, ast.Call):
            continue
        where = f"{file.relative_to(ROOT)}:{node.lineno}"
        called = ast.unparse(node.func)
        if called == "print":
            assert module_name(file) == "equifeat.cli", f"{where}: print is for cli.py"
        assert called not in {"eval", "exec"}, f"{where}: {called}"
        # pickle itself may be imported for its exceptions.
        loose = called.startswith("pickle.") and called != "pickle.UnpicklingError"
        assert not loose, f"{where}: {called}: no pickle"
        given = {key.arg: key.value for key in node.keywords if key.arg}
        for name, bad in (("strict", False), ("weights_only", False), ("allow_pickle", True)):
            value = given.get(name)
            # zip(strict=False) and the like are no loading.
            loads = "load" in called
            assert not (loads and isinstance(value, ast.Constant) and value.value is bad), (
                f"{where}: {called}({name}={bad})"
            )
        if called == "torch.load":
            assert "weights_only" in given, f"{where}: torch.load without weights_only=True"


def test_the_rules_see_what_they_forbid() -> None:
    tree = ast.parse("import timm\nfrom equifeat.loss import x\ny = t[:, 1:]\nz = t[:, 2:]")
    assert [name for name, _ in imports(tree)] == ["timm", "equifeat.loss.x"]
    assert sum(is_prefix_slice(node) for node in ast.walk(tree)) == 1
    assert layer("train.module") == "train.module"
    assert layer("train.cli") == "train"
    assert layer("data.pairs") == "data"
    for sibling in SIBLINGS:
        assert not set(SIBLINGS) & set(ALLOWED[sibling]) - {sibling}
    assert len(FILES) > 10
