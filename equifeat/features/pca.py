"""Pictures of features by three principal components: one basis for all images of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from equifeat.features.formats import Store
from equifeat.features.reader import read
from equifeat.features.resume import BASIS
from equifeat.files import atomic_file
from equifeat.pca_colors import Basis, fit_basis
from equifeat.progress import progress

_IMAGES = 2048  # The basis is fitted to features of at most so many images …
_ROWS = 32768  # … and to so many features, some 100 MB of a large model.
_SIDE = 1024  # Longer side of a picture at most.
_THREADS = 4


def draw_all(store: Store, names: Sequence[str], key: str, fresh: bool) -> int:
    """Draw NAME_pca.png for all images, from what is written.

    Args:
        store: The written features.
        names: Images to draw, at least one.
        key: Identity of the set of images. A basis fitted to the same set is used again.
        fresh: Whether all pictures are drawn; otherwise only missing ones, if the basis is kept.

    Returns:
        How many pictures were drawn.
    """
    path = store.side / BASIS
    basis = None if fresh else _kept(path, key)
    if basis is None:
        basis = fit_basis(torch.cat(list(_sample(store, names))))
        with atomic_file(path) as temporary:
            tensors = {name: value.contiguous() for name, value in vars(basis).items()}
            save_file(tensors, temporary, {"set": key})
        todo = list(names)
    else:
        todo = [name for name in names if not _picture(store, name).exists()]
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in progress(pool.map(partial(_draw, store, basis), todo), "pictures", len(todo)):
            pass
    return len(todo)


def _sample(store: Store, names: Sequence[str]) -> Iterator[Tensor]:
    """Yield some features of images spread evenly over all, always the same ones."""
    chosen = np.linspace(0, len(names) - 1, min(len(names), _IMAGES)).round().astype(int).tolist()
    each = max(16, _ROWS // len(chosen))
    generator = torch.Generator().manual_seed(0)
    for index in progress(chosen, "basis of the pictures"):
        rows = read(store.path(names[index])).features[0].flatten(1)
        if rows.shape[1] > each:
            rows = rows[:, torch.randperm(rows.shape[1], generator=generator)[:each]]
        yield rows.mT.float()


def _draw(store: Store, basis: Basis, name: str) -> None:
    found = read(store.path(name))
    colors = (basis.colors(found.features[0].permute(1, 2, 0)) * 255).round().byte().numpy()
    scale = min(1.0, _SIDE / max(found.size_hw))
    height, width = (max(1, round(side * scale)) for side in found.size_hw)
    picture = Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST)
    with atomic_file(_picture(store, name)) as temporary:
        picture.save(temporary, "PNG")


def _picture(store: Store, name: str) -> Path:
    return store.side / f"{name}_pca.png"


def _kept(path: Path, key: str) -> Basis | None:
    """Return the basis of the same set of images, if there is one."""
    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("set") == key
        return Basis(**load_file(path)) if same else None
    except (OSError, TypeError, SafetensorError):
        return None


def set_key(run: str, lines: Sequence[str]) -> str:
    """Return the identity of a set of images with their features.

    Args:
        run: Identity of model and options.
        lines: Their records.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(run.encode())
    for line in lines:
        digest.update(json.loads(line)["fingerprint"].encode())
    return digest.hexdigest()
