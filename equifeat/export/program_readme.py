"""README.md beside exported programs: how to run them with torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_USAGE = """```python
import torch

dense = torch.export.load("dense.pt2").module()
keypoints = torch.export.load("keypoints.pt2").module()

images = torch.rand({batch}, 3, {height}, {width})  # RGB in [0, 1], not normalised
points = torch.tensor([[[10.5, 20.5], [30.0, 25.0]]]){expand}  # xy in pixels
features = dense(images)  # (B, {dim}, rows, columns), not normalised
descriptors = keypoints(images, points)  # (B, N, {dim}), L2-normalised
```"""

_AOTI = """
The `*_aoti.pt2` files are compiled by AOTInductor for this kind of machine ({device}) and for this
version of torch. In Python:

```python
import torch

dense = torch._inductor.aoti_load_package("dense_aoti.pt2")
features = dense(torch.rand({batch}, 3, {height}, {width}{where}))
```

In C++: `torch::inductor::AOTIModelPackageLoader loader("dense_aoti.pt2");` and
`loader.run({{images}});`.
"""


def program_readme(title: str, facts: Mapping[str, Any]) -> str:
    """Return the text.

    Args:
        title: Name of the folder.
        facts: Content of config.json.

    Returns:
        Markdown.
    """
    images, patch = facts["images"], facts["patch_size"]
    free = not isinstance(images["height"], int)
    batch = 1 if images["batch"] == 1 else 2
    height = 4 * patch if free else images["height"]
    width = 6 * patch if free else images["width"]
    values = {"batch": batch, "height": height, "width": width, "dim": facts["dim"]}
    size = (
        f"- height and width: any multiple of {patch}, from {images['smallest_side']} pixels"
        if free
        else f"- images: {images['height']} × {images['width']} pixels (height × width)"
    )
    parts = [
        f"# {title}",
        "",
        f"View-equivariant features of `{facts['backbone']['name']}` (equifeat "
        f"{facts['equifeat']}) as programs of torch.export, made with torch {facts['torch']}. "
        "They need torch and nothing else. Run this in their folder:",
        "",
        _USAGE.format(**values, expand="" if batch == 1 else ".expand(2, -1, -1)"),
        "",
        size,
        f"- batch: {images['batch']}",
        f"- computes in {facts['compute']}",
        f"- points: {facts['keypoints']['xy']}; outside of the image they take its border's value",
    ]
    for name, worst in facts["largest_difference"].items():
        parts.append(
            f"- {name}: differs from the model by at most {worst['dense']:.1e} (features) and "
            f"{worst['keypoints']:.1e} (descriptors) of the largest feature, measured when it was "
            "written"
        )
    compiled = [name for name in facts["programs"] if name.startswith("AOTInductor")]
    if compiled:
        device = compiled[0].rsplit(" ", 1)[-1]
        where = "" if device == "cpu" else f', device="{device}"'
        parts.append(_AOTI.format(**values, device=device, where=where).rstrip())
    parts += [
        "",
        "torch.export.load and aoti_load_package can run code that a file brings along: load only "
        "files whose maker you trust.",
    ]
    return "\n".join(parts) + "\n"
