"""The model card: README.md of a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_USAGE = """```python
import equifeat

model = equifeat.load("{folder}")
maps = model.dense(images)               # images (B, 3, H, W), RGB in [0, 1]
descriptors = model.at(images, keypoints)  # keypoints (B, N, 2), xy in pixels
```"""

_PEFT = """`adapter_model.safetensors` and `adapter_config.json` are an ordinary PEFT adapter:

```python
import peft, timm

vit = timm.create_model("{name}", pretrained=True, num_classes=0, dynamic_img_size=True)
vit = peft.PeftModel.from_pretrained(vit, "{folder}").merge_and_unload()
```

The head in `head.safetensors` ({head}) comes after it, on the final normalised patch tokens."""


def model_card(title: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return a short model card in Markdown.

    Args:
        title: Name of the model, also of its folder.
        config: Content of config.json.
        facts: What else to say: "summary" (a paragraph), "results" (a list of equal dicts, one a
            row of a table), "note" (a paragraph under it); every other entry becomes a list item.

    Returns:
        The text.
    """
    backbone, lora, head = config["backbone"], config["lora"], config["head"]["kind"]
    parts = ["---", "library_name: equifeat", "tags: [feature-extraction, correspondence]", "---"]
    parts += [f"# {title}", ""]
    summary = facts.get("summary", "View-equivariant image features made with equifeat.")
    parts += [str(summary), "", "## What it is", ""]
    weights = backbone["weights"]["source"]
    parts += [
        f"- backbone: `{backbone['name']}` ({weights} weights, SHA-256 "
        f"`{backbone['sha256'][:16]}…`), frozen",
        "- LoRA: none"
        if lora is None
        else f"- LoRA: rank {lora['rank']}, alpha {lora['alpha']:g}, on q and v of the last "
        f"{lora['blocks']} blocks",
        f"- head: {head}",
        f"- points: {config['pixel_convention']}",
    ]
    rest = {key: value for key, value in facts.items() if key not in ("summary", "results", "note")}
    parts += [f"- {key}: {value}" for key, value in rest.items()]
    parts += ["", "## Use", "", _USAGE.format(folder=title)]
    if lora is not None:
        parts += ["", _PEFT.format(name=backbone["name"], folder=title, head=head)]
    rows = facts.get("results")
    if rows:
        parts += ["", "## Results", "", *_table(rows)]
    if "note" in facts:
        parts += ["", str(facts["note"])]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")
    return lines
