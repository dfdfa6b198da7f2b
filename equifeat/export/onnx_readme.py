"""README.md of an ONNX export: what the graphs take, and code that runs them without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equifeat.export.onnx_check import DENSE, KEYPOINTS

_README = """# {name} as ONNX

| file | inputs | output |
|---|---|---|
| `dense.onnx` | {images} | {features} raw features, one a patch of {patch} pixels |
| `keypoints.onnx` | {images}, {keypoints} | {descriptors} L2-normalised descriptors |

- Images: {content}.
- Sizes: {sizes}; {batch}.
- Points: {points}. A point outside the image takes the border's value.
- Precision: {precision}; inputs and outputs are float32. Opset {opset}, standard operators only.
- {check}

`config.json` says the same for programs, with the SHA-256 of the files. With NumPy and onnxruntime
only, in this folder:

```python
import numpy as np
import onnxruntime

# A photograph: np.asarray(PIL.Image.open(file).convert("RGB")), of the size above.
photo = np.random.randint(0, 256, ({height}, {width}, 3), dtype=np.uint8)
images = (photo.astype(np.float32) / 255).transpose(2, 0, 1)[None]  # (1, 3, H, W)

providers = ["CPUExecutionProvider"]  # on a GPU: "CUDAExecutionProvider" first
dense = onnxruntime.InferenceSession("dense.onnx", providers=providers)
(features,) = dense.run(["features"], {{"images": images}})
print(features.shape)  # (1, {dim}, rows, columns)

# xy in pixels of the image; the first pixel's centre is (0.5, 0.5). OpenCV's points: add 0.5.
points = np.random.rand(1, {count}, 2) * [{width}, {height}]
at = onnxruntime.InferenceSession("keypoints.onnx", providers=providers)
inputs = {{"images": images, "keypoints": points.astype(np.float32)}}
(descriptors,) = at.run(["descriptors"], inputs)
similarity = descriptors[0] @ descriptors[0].T  # cosines, because every length is 1
print(descriptors.shape, similarity.max())
```
"""


def readme(config: Mapping[str, Any]) -> str:
    """Return the text.

    Args:
        config: Content of config.json.

    Returns:
        Markdown.
    """
    model, files = config["model"], config["files"]
    dense, at = files[DENSE], files[KEYPOINTS]
    patch, check = model["patch_size"], config["check"]
    height, width = config["size_hw"] or (12 * patch, 16 * patch)
    points = config["points"]
    said = "These graphs were not run after they were written."
    if check is not None:
        said = (
            f"Run in {check['runtime']}, features differ from the model's by "
            f"{check['features']:.1e} of the largest feature, descriptors by "
            f"{check['descriptors']:.1e}."
        )
    return _README.format(
        name=model["backbone"]["name"],
        images=_port(at["inputs"][0]),
        keypoints=_port(at["inputs"][1]),
        features=_port(dense["outputs"][0]),
        descriptors=_port(at["outputs"][0]),
        patch=patch,
        content=config["images"],
        sizes=config["sizes"],
        batch="one image at a time" if config["batch"] == 1 else "any number of images at a time",
        points=config["pixel_convention"],
        precision=config["precision"],
        opset=config["opset"],
        check=said,
        dim=model["dim"],
        height=height,
        width=width,
        count=points if isinstance(points, int) else 100,
    )


def _port(port: Mapping[str, Any]) -> str:
    shape = ", ".join(str(n) for n in port["shape"])
    return f"`{port['name']}` ({shape})"
