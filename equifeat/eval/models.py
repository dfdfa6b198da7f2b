"""What --model names: a model folder, a timm ViT, a control; several are seeds of one model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from equifeat.checkpoint import load_model, read_config, trainable_state
from equifeat.errors import RecipeError
from equifeat.eval.controls import CoordinateOracle, RandomFeatures
from equifeat.eval.features import Dense
from equifeat.hub.fetch import fetch_model
from equifeat.hub.names import hub_name, is_hub_word
from equifeat.hub.pretrained import load_fetched
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.precision import set_precision
from equifeat.model.weights import PACKAGED_BACKBONE, packaged_available, state_hash

CONTROLS = {"oracle": CoordinateOracle, "random": RandomFeatures}


class ModelSpec(NamedTuple):
    """A row of a result table.

    Attributes:
        name: Its name in tables.
        words: What to open: one word, or several checkpoints that differ by their seed.
    """

    name: str
    words: tuple[str, ...]


class OpenModel(NamedTuple):
    """A model ready to be asked.

    Attributes:
        model: The model.
        hash: Identity of everything its features depend on.
    """

    model: Dense
    hash: str


def parse_models(words: Sequence[str]) -> list[ModelSpec]:
    """Read what stands behind --model.

    Args:
        words: Each `WHAT` or `NAME=WHAT[,WHAT …]`: a model folder, a model of a hub
            (`hf://USER/NAME` or `hf://USER/NAME@REVISION`), the name of a timm ViT, "oracle" or
            "random"; several are seeds of one model. `FOLDER@raw` is the ViT alone,
            `FOLDER@untrained` the model before its first step.

    Returns:
        One spec a row, in order.

    Raises:
        RecipeError: Two rows have one name, or a word is empty.
    """
    specs = []
    for word in words:
        name, equals, rest = word.partition("=")
        if not equals:
            name, rest = word, word
        parts = tuple(part for part in rest.split(",") if part) if equals else (rest,)
        if not name or not parts or not all(parts):
            raise RecipeError(f"--model {word!r} must be WHAT or NAME=WHAT[,WHAT].")
        specs.append(ModelSpec(name, parts))
    names = [spec.name for spec in specs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise RecipeError(f"--model names {twice[0]} twice: give rows different names, NAME=WHAT.")
    if not specs:
        raise RecipeError("--model names no model.")
    return specs


def with_controls(specs: Sequence[ModelSpec]) -> list[ModelSpec]:
    """Put the raw ViT and the untrained model before every finetuned one.

    Args:
        specs: Rows of the table.

    Returns:
        The rows with `WHAT@raw` and `WHAT@untrained` before each model folder; the raw ViT of
        several folders once.

    Raises:
        CheckpointError: A model folder cannot be read.
    """
    out: list[ModelSpec] = []
    seen: set[tuple[str, ...]] = set()
    for spec in specs:
        if all(_is_folder(word) for word in spec.words):
            backbone = read_config(model_folder(spec.words[0]))["backbone"]
            raw = tuple(str(backbone[key]) for key in ("name", "sha256", "position"))
            if raw not in seen:
                out.append(ModelSpec(f"{backbone['name']} raw", (f"{spec.words[0]}@raw",)))
            seen.add(raw)
            words = tuple(f"{word}@untrained" for word in spec.words)
            out.append(ModelSpec(f"{spec.name} untrained", words))
        out.append(spec)
    return out


def _is_folder(word: str) -> bool:
    return Path(word).exists() or "/" in word or word.startswith(".")


@cache
def _fetched(word: str) -> Path:
    """Fetch once: all rows of a table are then of one commit, whoever pushes meanwhile."""
    return fetch_model(hub_name(word))


def model_folder(word: str) -> Path:
    """Return the folder of a model.

    Args:
        word: A model folder, or hf://USER/NAME[@REVISION], which is fetched.

    Returns:
        The folder; of a model of a hub, one in its cache.

    Raises:
        CheckpointError: The model of a hub cannot be had.
        MissingExtraError: huggingface_hub is not installed.
    """
    return _fetched(word) if is_hub_word(word) else Path(word)


def open_model(model: str, weights: str = "auto", device: str = "cpu") -> FeatureExtractor:
    """Open a finetuned model, from a folder or a hub, or any timm ViT raw.

    Args:
        model: A model folder, hf://USER/NAME[@REVISION], or the name of a timm ViT.
        weights: For a raw ViT: "hub", "packaged", "random", a file, or "auto", which takes the
            packaged weights when the model is the packaged one and they are installed, else the
            hub's. For a model of a hub: the same for its backbone, "auto" as its config.json says.
        device: Device of the model.

    Returns:
        The extractor in eval mode.

    Raises:
        CheckpointError: The folder is not a model folder.
        ModelNameError: timm has no such model.
    """
    if is_hub_word(model):
        own = None if weights == "auto" else weights
        return load_fetched(model_folder(model), hub_name(model), device, own)
    if _is_folder(model):
        return load_model(Path(model), device).eval()
    if weights == "auto":
        weights = "packaged" if model == PACKAGED_BACKBONE and packaged_available() else "hub"
    return build_extractor(model, weights, lora_blocks=0).to(device).eval()


def open_word(
    word: str, weights: str = "auto", device: str = "cpu", precision: str = "float32"
) -> OpenModel:
    """Open one word of a model spec.

    Args:
        word: See `parse_models`.
        weights: See `open_model`.
        device: Device of the model.
        precision: Type that a ViT computes in: float32, bfloat16 or float16. It is part of the
            model's hash.

    Returns:
        The model and its hash.

    Raises:
        CheckpointError: The folder is not a model folder.
        ModelNameError: timm has no such model.
        RecipeError: There is no such precision.
    """
    if word in CONTROLS and not Path(word).exists():
        control = CONTROLS[word]()
        return OpenModel(control, control.hash)
    what, _, control = word.rpartition("@")
    if control in ("raw", "untrained") and what and not Path(word).exists():
        trained = open_model(what, weights, device)
        extractor = trained.raw() if control == "raw" else untrained(trained, model_folder(what))
        extractor = extractor.to(device).eval()
    else:
        extractor = open_model(word, weights, device)
    set_precision(extractor, precision)
    return OpenModel(extractor, extractor_hash(extractor))


def untrained(trained: FeatureExtractor, folder: Path) -> FeatureExtractor:
    """Return a finetuned model as it was before its first step.

    Args:
        trained: The model.
        folder: Its folder, whose config.json names the seed.

    Returns:
        Another extractor on the same backbone.

    Raises:
        RecipeError: The folder does not tell the seed.
    """
    recipe = read_config(folder).get("recipe") or {}
    if not isinstance(recipe.get("seed"), int):
        raise RecipeError(
            f"{folder}/config.json does not tell the seed of the run, so its untrained model is "
            "not known: export it with run.export_steps: [0] and name that folder."
        )
    adapter = trained.adapter
    return build_extractor(
        trained.backbone,
        head=trained.head.kind,
        lora_rank=adapter.rank if adapter else 4,
        lora_alpha=adapter.alpha if adapter else None,
        lora_blocks=trained.tail_blocks,
        seed=recipe["seed"],
    )


def extractor_hash(extractor: FeatureExtractor) -> str:
    """Return the identity of all that an extractor's features depend on.

    Args:
        extractor: The model.

    Returns:
        64 hexadecimal digits.
    """
    backbone = extractor.backbone
    state = {f"trained.{k}": v for k, v in trainable_state(extractor).items()}
    adapter = extractor.adapter
    scale = "" if adapter is None else f" lora {adapter.first_block} {adapter.alpha / adapter.rank}"
    text = (
        f"{backbone.name} {backbone.position} {backbone.weights_hash()} {backbone.compute_dtype}"
        f"{scale} head {extractor.head.kind} {state_hash(state)}"
    )
    if extractor.sampling != "exact":
        text += f" sampling {extractor.sampling}"
    return hashlib.sha256(text.encode()).hexdigest()
