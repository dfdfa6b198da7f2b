"""Data sets in the layout of OnePose and OnePose++: sequences of one object, with an SfM model.

Written from doc/dataset_document.md and src/sfm_utils of github.com/zju3dv/OnePose_Plus_Plus and
the folders that github.com/qq456cvb/3DCorrEnhance reads. Lengths are metres. Intrinsics and
keypoints are returned as the files have them; docs/pose.md says which pixels each means.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from equifeat.errors import EvalDataError

IMAGES = "lowtexture_test_data"
SFM = "sfm_output/outputs_softmax_loftr_loftr"
_MAX_TEXT = 64 * 1024
# The 2D annotations may hold descriptors too.
_MAX_JSON = 2**29
_MAX_POINTS_BYTES = 2**28
_ROTATION_TOLERANCE = 1e-2


class OnePoseFrame(NamedTuple):
    """One cropped picture of a sequence.

    Attributes:
        folder: Folder of the sequence.
        name: Name of its files without suffix.
    """

    folder: Path
    name: str

    @property
    def picture(self) -> Path:
        """The picture."""
        return self.folder / "color" / f"{self.name}.png"

    @property
    def intrinsics(self) -> Path:
        """The file of K."""
        return self.folder / "intrin_ba" / f"{self.name}.txt"

    @property
    def pose(self) -> Path:
        """The file of the true pose."""
        return self.folder / "poses_ba" / f"{self.name}.txt"

    @property
    def annotation(self) -> Path:
        """The file of the 2D-3D matches; only frames that SfM was made of have one."""
        return self.folder / "anno_loftr" / f"{self.name}.json"

    def camera_matrix(self) -> Float[Tensor, "3 3"]:
        """Read the intrinsics.

        Returns:
            (3, 3) float64.

        Raises:
            EvalDataError: The file is missing or holds no intrinsics.
        """
        K = _matrix(self.intrinsics, 3)
        last = bool((K[2] == K.new_tensor([0.0, 0.0, 1.0])).all())
        if not last or K[0, 0] <= 0 or K[1, 1] <= 0 or K[1, 0] != 0:
            _refuse(self.intrinsics, "not the intrinsics of a pinhole camera")
        return K

    def cam_from_object(self) -> Float[Tensor, "4 4"]:
        """Read the true pose.

        Returns:
            (4, 4) float64, metres, OpenCV axes.

        Raises:
            EvalDataError: The file is missing or holds no pose.
        """
        pose = _matrix(self.pose, 4)
        R = pose[:3, :3]
        off = (R @ R.mT - torch.eye(3, dtype=R.dtype)).abs().max()
        last = bool((pose[3] == pose.new_tensor([0.0, 0.0, 0.0, 1.0])).all())
        if not last or off > _ROTATION_TOLERANCE or torch.linalg.det(R) < 0:
            _refuse(self.pose, "not a rigid transform")
        return pose


class OnePoseObject(NamedTuple):
    """One object with its two sequences.

    Attributes:
        root: Folder of the data set.
        name: Such as "0700-toyrobot-others".
    """

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        """Folder of its sequences."""
        return self.root / IMAGES / self.name

    def sequence(self, number: int) -> Path:
        """Return the folder of a sequence: 1 shows the object, 2 asks for its pose."""
        return self.folder / f"{self.name.split('-')[1]}-{number}"

    @property
    def points_file(self) -> Path:
        """File of the SfM model's points."""
        return self.root / SFM / self.name / "anno" / "anno_3d_average.npz"

    @property
    def model_file(self) -> Path | None:
        """The scanned surface, metres; only some objects have one."""
        for name in ("model_eval.ply", "model.ply"):
            if (self.folder / name).is_file():
                return self.folder / name
        return None

    def templates(self) -> list[OnePoseFrame]:
        """Return the annotated frames of sequence 1, sorted by name."""
        folder = self.sequence(1)
        files = sorted((folder / "anno_loftr").glob("*.json"))
        return [OnePoseFrame(folder, file.stem) for file in files]

    def queries(self) -> list[OnePoseFrame]:
        """Return the frames of sequence 2, sorted by name as text, as the reference does."""
        folder = self.sequence(2)
        return [
            OnePoseFrame(folder, file.stem) for file in sorted((folder / "color").glob("*.png"))
        ]

    def points(self) -> Float[Tensor, "p 3"]:
        """Read the points of the SfM model.

        Returns:
            (P, 3) float64, metres, in the object's axes.

        Raises:
            EvalDataError: The file is missing or not in its format.
        """
        file = self.points_file
        if not file.is_file():
            raise EvalDataError(f"{file} is missing; run the reconstruction of OnePose++ again.")
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.getinfo("keypoints3d.npy").file_size > _MAX_POINTS_BYTES:
                    _refuse(file, f"its points are more than {_MAX_POINTS_BYTES} bytes")
            with np.load(file, allow_pickle=False) as content:
                points = np.asarray(content["keypoints3d"], dtype=np.float64)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            _refuse(file, f"no array keypoints3d can be read ({error})", error)
        if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
            _refuse(file, f"keypoints3d of shape {points.shape} is not a finite list of 3D points")
        return torch.from_numpy(points)

    def diameter(self) -> float | None:
        """Read the diameter of the scanned surface, metres; None where there is no such file."""
        file = self.folder / "diameter.txt"
        if not file.is_file():
            return None
        try:
            value = float(_text(file, _MAX_TEXT))
        except ValueError as error:
            _refuse(file, "not a number", error)
        if not 0.0 < value < float("inf"):
            _refuse(file, f"{value:g} is no diameter")
        return value

    def box(self) -> Float[Tensor, "8 3"] | None:
        """Read the corners of the annotated box, metres; None where there is no such file."""
        file = self.folder / "box3d_corners.txt"
        return _matrix(file, 8, 3) if file.is_file() else None


class Matches2d3d(NamedTuple):
    """Pixels of a picture with the points of the SfM model seen there.

    Attributes:
        keypoints: (K, 2) float64 pixels as in the file.
        points: (K,) int64 rows of the model's points.
    """

    keypoints: Float[Tensor, "k 2"]
    points: Int[Tensor, "k"]


def find_objects(root: Path) -> list[OnePoseObject]:
    """Return the objects of a data set.

    Args:
        root: Folder with lowtexture_test_data and sfm_output.

    Returns:
        Objects sorted by name; none where there is no such folder.
    """
    folder = root / IMAGES
    if not folder.is_dir():
        return []
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    # id-name-category, as OnePose++ tells objects from other folders
    return [OnePoseObject(root, name) for name in names if all(name.split("-")[:2]) and "-" in name]


def read_matches(frame: OnePoseFrame, count: int) -> Matches2d3d:
    """Read the 2D-3D matches of a frame.

    Args:
        frame: A frame of sequence 1.
        count: Number of points of the SfM model.

    Returns:
        The matches; perhaps none.

    Raises:
        EvalDataError: The file is missing or not in its format.
    """
    file = frame.annotation
    try:
        content: dict[str, Any] = json.loads(_text(file, _MAX_JSON))
        keypoints = np.asarray(content["keypoints2d"], dtype=np.float64).reshape(-1, 2)
        pairs = np.asarray(content["assign_matrix"])
        if not pairs.size:
            return Matches2d3d(torch.zeros(0, 2).double(), torch.zeros(0, dtype=torch.int64))
        if pairs.ndim != 2 or len(pairs) != 2 or pairs.dtype.kind != "i":
            raise ValueError("assign_matrix is not two rows of whole numbers")
        if pairs.min() < 0 or pairs[0].max() >= len(keypoints) or pairs[1].max() >= count:
            raise ValueError(
                f"assign_matrix names others than its {len(keypoints)} keypoints and the {count} "
                "points of anno_3d_average.npz"
            )
        chosen = keypoints[pairs[0]]
        if not np.isfinite(chosen).all():
            raise ValueError("a keypoint is not a number")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        _refuse(file, f"not a 2D annotation ({type(error).__name__}: {error})", error)
    return Matches2d3d(torch.from_numpy(chosen), torch.from_numpy(pairs[1].astype(np.int64)))


def _matrix(file: Path, rows: int, columns: int | None = None) -> Tensor:
    columns = columns or rows
    try:
        values = [[float(word) for word in line.split()] for line in _lines(file)]
        matrix = torch.tensor(values, dtype=torch.float64)
    except ValueError as error:
        _refuse(file, f"not a table of numbers ({error})", error)
    if matrix.shape != (rows, columns) or not bool(matrix.isfinite().all()):
        _refuse(file, f"not {rows} rows of {columns} finite numbers")
    return matrix


def _lines(file: Path) -> list[str]:
    return [line for line in _text(file, _MAX_TEXT).splitlines() if line.strip()]


def _text(file: Path, limit: int) -> str:
    if not file.is_file():
        raise EvalDataError(f"{file} is missing; unpack the data set again.")
    if (size := file.stat().st_size) > limit:
        _refuse(file, f"{size} bytes are more than {limit}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _refuse(file, str(error), error)


def _refuse(file: Path, why: str, error: Exception | None = None) -> NoReturn:
    raise EvalDataError(f"{file}: {why}; get the data set again.") from error
