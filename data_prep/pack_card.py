"""The dataset card of a packed set: what the hub shows, and how to read a row without equifeat."""

from __future__ import annotations

_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- equifeat
- multi-view
- depth
---

# Posed views with depth

{objects} objects, {views} views, packed by `equifeat pack`; colour is lossless {color}.
One row is a view, the rows of an object are adjacent.

| column | type | meaning |
|---|---|---|
| `object` | string | name of the object |
| `view` | int32 | index of the view |
| `color` | image | RGB within `window`; outside it is black |
| `depth` | bytes | z-depth in steps within `window`: uint16 LE, row by row, zstd |
| `mask` | bytes or null | bits of `window`, row by row, zstd; null: it is `depth > 0` |
| `window` | 4 int32 | x0, y0, x1, y1 of the part that is kept |
| `size_hw` | 2 int32 | height and width of the whole view |
| `depth_step` | float64 | object units of one step of depth; depth 0 = background |
| `K` | 9 float32 | intrinsics, row by row; the first pixel's centre is (0.5, 0.5) |
| `cam_from_world` | 16 float32 | pose, row by row; OpenCV axes |
| `record` | string or null | views.json of the object, in its first row |

`equifeat fit --data.views FOLDER` trains from the folder this file lies in. Without equifeat:

    import numpy as np, pyarrow as pa
    from datasets import load_dataset

    row = load_dataset("parquet", data_files="data/*.parquet", split="train")[0]
    x0, y0, x1, y1 = row["window"]
    raw = pa.decompress(row["depth"], 2 * (y1 - y0) * (x1 - x0), "zstd")
    depth = np.zeros(row["size_hw"], np.float32)
    depth[y0:y1, x0:x1] = np.frombuffer(raw, "<u2").reshape(y1 - y0, x1 - x0)
    depth *= np.float32(row["depth_step"])
"""


def card(objects: int, views: int, color: str) -> str:
    """Return README.md of a packed set.

    Args:
        objects: Number of objects.
        views: Number of views.
        color: Format of the colour pictures.

    Returns:
        Markdown with the YAML header that the hub reads.
    """
    return _CARD.format(objects=objects, views=views, color={"webp": "WebP", "png": "PNG"}[color])
