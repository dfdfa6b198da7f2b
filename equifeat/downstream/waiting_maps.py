"""Feature maps that wait in a folder until all are there, and principal components of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equifeat.files import atomic_file
from equifeat.progress import progress

_JOB = "job.json"


class Principal(NamedTuple):
    """Principal components.

    Attributes:
        mean: (D) float32.
        components: (K, D) float32, orthonormal rows by falling variance.
        share: (K) float32, how much of the variance each explains.
    """

    mean: Tensor
    components: Tensor
    share: Tensor


@dataclass(frozen=True)
class WaitingMaps:
    """The maps of a job, one file an image, and what is done to them when they are read.

    Args:
        folder: Where they wait.
        count: How many there are.
        principal: Components to project to, or None.
        half: Give float16 instead of float32.
    """

    folder: Path
    count: int
    principal: Principal | None = None
    half: bool = False

    def has(self, index: int) -> bool:
        """Return whether a map is there."""
        return self._file(index).is_file()

    def put(self, index: int, values: Tensor) -> None:
        """Store a map.

        Args:
            index: Number of the image.
            values: (h, w, D) float32 on the CPU.
        """
        with atomic_file(self._file(index)) as temporary:
            np.save(temporary, values.numpy())

    def raw(self) -> Iterator[NDArray[np.float32]]:
        """Give (h, w, D) as computed, mapped into memory."""
        for index in range(self.count):
            yield self._map(index)

    def __iter__(self) -> Iterator[Tensor]:
        """Give (h, w, D or K) tensors in the type to be written."""
        for values in self.raw():
            out = torch.from_numpy(np.array(values))
            if self.principal is not None:
                out = (out - self.principal.mean) @ self.principal.components.T
            yield out.half() if self.half else out

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return (h, w, channels) as written."""
        h, w, dim = self._map(index).shape
        return h, w, dim if self.principal is None else len(self.principal.components)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def _map(self, index: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.load(self._file(index), mmap_mode="r", allow_pickle=False)
        return found


def waiting_maps(folder: Path, job: Mapping[str, Any], count: int) -> WaitingMaps:
    """Return what was computed of a job so far; what waits of another job is deleted.

    Args:
        folder: Where the maps wait; it is made.
        job: All that the maps depend on; anything JSON can hold.
        count: How many there will be.

    Returns:
        The maps, none or some of them there.
    """
    note = json.dumps(job)
    if (folder / _JOB).is_file():
        if (folder / _JOB).read_text(encoding="utf-8") == note:
            return WaitingMaps(folder, count)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / _JOB) as temporary:
        temporary.write_text(note, encoding="utf-8")
    return WaitingMaps(folder, count)


def fit_principal(maps: WaitingMaps, count: int) -> Principal:
    """Fit principal components to all features of all images, one image in memory at a time.

    Args:
        maps: The maps.
        count: Components K.

    Returns:
        The components; the largest entry of each is positive, so that a second fit gives the same.
    """
    dim, rows = maps.shape(0)[-1], 0
    total = torch.zeros(dim, dtype=torch.float64)
    products = torch.zeros(dim, dim, dtype=torch.float64)
    for values in progress(maps.raw(), "principal components", maps.count):
        flat = torch.from_numpy(np.array(values)).reshape(-1, dim).double()
        total, products, rows = total + flat.sum(0), products + flat.T @ flat, rows + len(flat)
    mean = total / rows
    covariance = products / rows - mean[:, None] * mean
    variance, vectors = torch.linalg.eigh(covariance)
    components = vectors.T.flip(0)[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    share = variance.flip(0)[:count].clamp_min(0) / variance.clamp_min(0).sum().clamp_min(1e-30)
    found = (mean, components * largest.sign(), share)
    return Principal(*(value.float().contiguous() for value in found))
