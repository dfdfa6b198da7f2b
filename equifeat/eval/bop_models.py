"""The object models of a BOP data set, read when they are first needed."""

from __future__ import annotations

from pathlib import Path

from equifeat.data.bop import read_models_info
from equifeat.data.triangles import read_triangles
from equifeat.errors import EvalDataError
from equifeat.eval.bop_score import ScoredObject
from equifeat.metrics.bop import symmetry_transforms


class BopModels:
    """Surfaces, diameters and symmetries by object.

    Args:
        folder: With models_info.json and obj_000001.ply, …

    Raises:
        EvalDataError: models_info.json is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.infos = read_models_info(folder)
        self._read: dict[int, ScoredObject] = {}

    def file(self, obj: int) -> Path:
        """Return the file of an object's surface, whether it exists or not."""
        return self.folder / f"obj_{obj:06d}.ply"

    def __getitem__(self, obj: int) -> ScoredObject:
        if obj not in self._read:
            if obj not in self.infos:
                raise EvalDataError(
                    f"{self.folder / 'models_info.json'}: says nothing of object {obj}; unpack "
                    "the models again."
                )
            info = self.infos[obj]
            symmetries = symmetry_transforms(info.discrete, info.continuous)
            self._read[obj] = ScoredObject(read_triangles(self.file(obj)), info, symmetries)
        return self._read[obj]


def models_folder(root: Path) -> Path:
    """Return the folder of models that errors are computed with, as the toolkit does.

    Args:
        root: Folder of the data.

    Returns:
        models_eval where there is one, else models.
    """
    evaluated = root / "models_eval"
    return evaluated if (evaluated / "models_info.json").is_file() else root / "models"
