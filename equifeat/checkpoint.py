"""Models on disk: the model folder, strict and versioned.

A model folder holds only what was trained: adapter_model.safetensors and adapter_config.json (stock
PEFT loads them), head.safetensors, config.json and a model card. The backbone is named in
config.json with the SHA-256 of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from equifeat._version import __version__
from equifeat.errors import CheckpointError, RecipeError, WeightsError
from equifeat.files import atomic_folder
from equifeat.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraAdapter
from equifeat.model.backbone import Backbone, load_backbone
from equifeat.model.card import model_card
from equifeat.model.extractor import FeatureExtractor, Sampling
from equifeat.model.head import Head
from equifeat.model.weights import describe_mismatch, read_tensors

FORMAT = "equifeat-model"
VERSION = 1
"""The format version of every model that samples points exactly."""
SAMPLING_VERSION = 2
"""The version of models with sampling "reference": older readers would sample other points."""
CONFIG = "config.json"
HEAD_WEIGHTS = "head.safetensors"
CARD = "README.md"
PIXEL_CONVENTION = (
    "xy in pixels of the image; its top-left corner is (0, 0), the first pixel's centre (0.5, 0.5)"
)
_FILES = {CONFIG, HEAD_WEIGHTS, ADAPTER_WEIGHTS, ADAPTER_CONFIG, CARD}


def save_model(
    extractor: FeatureExtractor,
    folder: str | Path,
    recipe: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder, whole or not at all.

    Args:
        extractor: The model; its backbone's weights are not written, only named.
        folder: Where to write. An older model folder there is replaced.
        recipe: How the model was trained, kept in config.json; anything JSON can hold. None for
            what a loaded model had.
        card: Facts for the model card, see `equifeat.model.card.model_card`.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds something else, or the model cannot be named.
    """
    folder = Path(folder)
    _refuse_foreign(folder)
    config = _config(extractor, extractor.recipe if recipe is None else recipe)
    with atomic_folder(folder) as new:
        if extractor.adapter is not None:
            blocks, name = extractor.backbone.blocks, extractor.backbone.name
            extractor.adapter.save_peft(new, blocks, name)
        head = extractor.head.state_dict()
        head = {key: value.detach().cpu().contiguous() for key, value in head.items()}
        if head:
            save_file(head, new / HEAD_WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(
            json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8"
        )
        (new / CARD).write_text(model_card(folder.name, config, card or {}), encoding="utf-8")
        # peft puts an empty template of a card and nothing else beside its two files.
        for extra in {path.name for path in new.iterdir()} - _FILES:
            (new / extra).unlink()
    return folder


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    *,
    weights: str | None = None,
    backbone: Backbone | None = None,
) -> FeatureExtractor:
    """Read a model folder, strictly: every tensor must fit, and the backbone be the same.

    Args:
        folder: What `save_model` wrote.
        device: Where to put the model.
        weights: Another place to take the backbone's weights from: "hub", "packaged" or a file.
        backbone: A backbone already loaded, to be shared.

    Returns:
        The extractor.

    Raises:
        CheckpointError: The folder is incomplete, damaged, from a newer version, or its tensors or
            its backbone do not fit.
        WeightsError: The backbone's weights cannot be had.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        spec, lora, head = config["backbone"], config["lora"], config["head"]
        if backbone is None:
            backbone = _load_named_backbone(spec, weights, folder)
        _check_backbone(backbone, spec, folder)
        adapter = None
        if lora is not None:
            blocks, rank, alpha = int(lora["blocks"]), int(lora["rank"]), float(lora["alpha"])
            adapter = LoraAdapter(backbone.blocks, blocks, rank, alpha)
        extractor = FeatureExtractor(backbone, adapter, Head(str(head["kind"]), backbone.dim))
        extractor.sampling = _sampling(config)
    except RecipeError as error:
        raise CheckpointError(f"{folder / CONFIG} is wrong: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG} lacks or garbles {error}") from error
    expected = {CONFIG}
    if extractor.adapter is not None:
        extractor.adapter.load_peft(folder, backbone.blocks)
        expected |= {ADAPTER_WEIGHTS, ADAPTER_CONFIG}
    if extractor.head.conv is not None:
        _load_head(extractor, folder / HEAD_WEIGHTS)
        expected |= {HEAD_WEIGHTS}
    surplus = {name for name in _FILES - {CARD} - expected if (folder / name).exists()}
    if surplus:
        raise CheckpointError(f"{folder} holds {min(surplus)}, which {CONFIG} knows nothing of")
    extractor.recipe = config.get("recipe")
    return extractor.to(device).eval()


def trainable_state(extractor: FeatureExtractor) -> dict[str, Tensor]:
    """Return copies of the trainable weights, for a checkpoint to resume from.

    Args:
        extractor: The model.

    Returns:
        Tensors on the CPU by name; the frozen backbone is not among them.
    """
    parameters = extractor.trainable_parameters()
    return {name: value.detach().cpu().clone() for name, value in parameters.items()}


def load_trainable_state(extractor: FeatureExtractor, state: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_state` returned, strictly.

    Args:
        extractor: A model built with the same options.
        state: The tensors.

    Raises:
        CheckpointError: A name or shape differs.
    """
    parameters = extractor.trainable_parameters()
    problem = describe_mismatch(parameters, state)
    if problem:
        raise CheckpointError(f"the checkpoint is of a model with other options: {problem}")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(state[name])


def _config(extractor: FeatureExtractor, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the content of config.json."""
    backbone, adapter = extractor.backbone, extractor.adapter
    source = backbone.source
    if source.kind == "merged":
        raise CheckpointError("a merged model has no adapter to save: save the model before merged")
    if backbone.dtype != torch.float32:
        raise CheckpointError(f"the backbone is in {backbone.dtype}: save the model in float32")
    weights = {"source": source.kind, "path": source.path, "seed": source.seed}
    exact = extractor.sampling == "exact"
    return {
        "format": FORMAT,
        "version": VERSION if exact else SAMPLING_VERSION,
        "equifeat": __version__,
        "backbone": {
            "name": backbone.name,
            "sha256": backbone.weights_hash(),
            "weights": {key: value for key, value in weights.items() if value is not None},
            "position": backbone.position,
            "patch_size": backbone.patch_size,
            "dim": backbone.dim,
            "mean": _rounded(backbone.mean),
            "std": _rounded(backbone.std),
        },
        "lora": None
        if adapter is None
        else {
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "blocks": extractor.tail_blocks,
            "targets": ["q", "v"],
        },
        "head": {"kind": extractor.head.kind},
        **({} if exact else {"sampling": extractor.sampling}),
        "pixel_convention": PIXEL_CONVENTION,
        "recipe": dict(recipe) if recipe is not None else None,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model folder and check that it is ours and not from the future.

    Args:
        folder: The model folder.

    Returns:
        Its content.

    Raises:
        CheckpointError: There is none, or it is of another format or a newer version.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of an equifeat model (format {FORMAT!r})")
    version = config.get("version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path} has no valid format version: {version!r}")
    if version > SAMPLING_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this equifeat {__version__} reads up to "
            f"{SAMPLING_VERSION}: upgrade with pip install -U equifeat"
        )
    return config


def _sampling(config: Mapping[str, Any]) -> Sampling:
    """Return where a model samples points, by its config.json."""
    if config["version"] < SAMPLING_VERSION:
        return "exact"
    if config["sampling"] != "reference":
        raise ValueError(f"sampling {config['sampling']!r}")
    return "reference"


def _load_named_backbone(spec: Mapping[str, Any], weights: str | None, folder: Path) -> Backbone:
    """Get the backbone that config.json names."""
    source = spec["weights"]
    kind, path = source["source"], source.get("path")
    if weights is None:
        if kind == "file" and path and Path(path).is_file():
            weights = path
        elif kind in ("hub", "packaged", "random"):
            weights = kind
        else:
            raise CheckpointError(
                f"{folder} was trained on weights of {spec['name']!r} from "
                f"{path or 'a model built in Python'}, not found here: give weights=FILE"
            )
    assert weights is not None
    seed = int(source.get("seed", 0))
    return load_backbone(spec["name"], weights, position=spec["position"], seed=seed)


def _check_backbone(backbone: Backbone, spec: Mapping[str, Any], folder: Path) -> None:
    """Check that a backbone is the one that config.json names."""
    facts = {
        "name": backbone.name,
        "position": backbone.position,
        "patch_size": backbone.patch_size,
        "mean": _rounded(backbone.mean),
        "std": _rounded(backbone.std),
    }
    for key, value in facts.items():
        if spec[key] != value:
            raise CheckpointError(
                f"{folder} needs a backbone with {key} {spec[key]!r}, but this one has {value!r}"
            )
    found = backbone.weights_hash()
    if spec["sha256"] != found:
        raise CheckpointError(
            f"{folder} was trained on weights of {backbone.name!r} with SHA-256 "
            f"{str(spec['sha256'])[:16]}…, but these have {found[:16]}…: give its own weights"
        )


def _load_head(extractor: FeatureExtractor, path: Path) -> None:
    """Read head.safetensors, strictly."""
    try:
        found = read_tensors(path)
    except WeightsError as error:
        raise CheckpointError(f"{path.parent} is incomplete: {error}") from error
    problem = describe_mismatch(extractor.head.state_dict(), found)
    if problem:
        raise CheckpointError(f"{path} does not fit {CONFIG}: {problem}")
    extractor.head.load_state_dict(found, strict=True)


def _refuse_foreign(folder: Path) -> None:
    """Raise unless a model folder may be written here."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder for the model")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(there - _FILES)
    if foreign or (there and CONFIG not in there):
        name = foreign[0] if foreign else min(there)
        raise CheckpointError(
            f"{folder} is not a model folder (it holds {name!r}) and will not be overwritten: "
            "give a new folder"
        )
    if there:
        read_config(folder)


def _rounded(values: Tensor) -> list[float]:
    """Return statistics as the short decimals they were written as."""
    return [round(float(value), 6) for value in values.flatten()]
