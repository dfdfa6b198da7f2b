"""PF-PASCAL (Ham et al., "Proposal Flow", TPAMI 2018): lists of pairs as CSV, annotations as .mat.

A line is `source_image,target_image,class,XA,YA,XB,YB`, coordinates joined by ";". The lists of
3DCorrEnhance (github.com/qq456cvb/3DCorrEnhance, data/) hold each picture's own visible keypoints:
where two lists differ in length, equal positions in them need not be the same keypoint. The .mat
annotations keep a place for every keypoint, NaN when it is hidden, and have no such doubt; HPF and
DHPF (github.com/juhongm999/dhpf, data/pfpascal.py) read those.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from equifeat.data.semantic_pairs import KeypointPair, PairList, points_of
from equifeat.data.text_files import MAX_ANNOTATION_BYTES, MAX_LIST_BYTES, plain_name, read_text
from equifeat.errors import EvalDataError, import_extra

# Class numbers of the lists, from 1.
CATEGORIES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
LISTS = {
    "different": ("test_pairs_pf_different_views.csv",),
    "same": ("test_pairs_pf_same_views.csv",),
    "test": ("test_pairs.csv", "test_pairs_pf_pascal.csv"),
}
_COLUMNS = {"csv": 7, "mat": 3}


def read_pf_pascal(
    root: Path,
    pairs: Literal["different", "same", "test"],
    annotations: Literal["csv", "mat"] = "csv",
    unequal: Literal["first", "skip"] = "first",
) -> PairList:
    """Read a list of PF-PASCAL pairs.

    Args:
        root: PF-dataset-PASCAL (or PF-PASCAL), or the folder that holds it.
        pairs: Which list.
        annotations: Where keypoints come from: the list itself, or the .mat file of each picture,
            which has the box as well.
        unequal: What to do with a line whose two lists of keypoints differ in length: match their
            first entries, as the reference does, or leave the pair out.

    Returns:
        The pairs.

    Raises:
        EvalDataError: A file is missing or not in its format.
        MissingExtraError: .mat files need scipy.
    """
    base = pf_pascal_folder(root)
    names = LISTS[pairs]
    path = next((base / name for name in names if (base / name).is_file()), None)
    if path is None:
        raise EvalDataError(f"{base} holds no list of pairs {' or '.join(names)}")
    found, files, skipped = [], [path], 0
    known: dict[Path, tuple[Tensor, Tensor]] = {}
    reader = csv.reader(io.StringIO(read_text(path, MAX_LIST_BYTES)))
    next(reader, None)
    for row in reader:
        where = f"{path}: line {reader.line_num}"
        if not row:
            continue
        if len(row) < _COLUMNS[annotations]:
            raise EvalDataError(
                f"{where} has {len(row)} columns, not source_image,target_image,class,XA,YA,XB,YB."
            )
        source, target = (plain_name(where, name) for name in row[:2])
        category = _category(where, row[2])
        box = None
        if annotations == "mat":
            read = []
            for name in (source, target):
                mat = base / "Annotations" / category / f"{Path(name).stem}.mat"
                if mat not in known:
                    known[mat] = _read_mat(mat)
                    files.append(mat)
                read.append(known[mat])
            xy0, xy1 = _common(where, read[0][0], read[1][0])
            box = read[1][1]
        else:
            # the last four columns: training lists of DHPF have "flip" before them
            columns = [column.strip(" ;").split(";") for column in row[-4:]]
            columns = [[word for word in column if word.strip()] for column in columns]
            xy0, xy1 = points_of(where, *columns[:2]), points_of(where, *columns[2:])
            if len(xy0) != len(xy1):
                if unequal == "skip":
                    skipped += 1
                    continue
                count = min(len(xy0), len(xy1))
                xy0, xy1 = xy0[:count], xy1[:count]
        number = reader.line_num - 1
        found.append(
            KeypointPair(
                f"{number:04d} {category} {Path(source).stem} {Path(target).stem}",
                base / "JPEGImages" / source,
                base / "JPEGImages" / target,
                category,
                xy0,
                xy1,
                box,
            )
        )
    return PairList(found, files, skipped)


def pf_pascal_folder(root: Path) -> Path:
    """Return the folder that holds JPEGImages.

    Args:
        root: It, or its parent.

    Returns:
        The folder.

    Raises:
        EvalDataError: There is none.
    """
    for base in (root, root / "PF-dataset-PASCAL", root / "PF-PASCAL"):
        if (base / "JPEGImages").is_dir():
            return base
    raise EvalDataError(f"{root} holds no folder JPEGImages")


def _category(where: str, word: str) -> str:
    try:
        number = int(float(word))
    except ValueError:
        number = 0
    if not 1 <= number <= len(CATEGORIES):
        raise EvalDataError(f"{where}: class {word!r} is not a number from 1 to {len(CATEGORIES)}.")
    return CATEGORIES[number - 1]


def _common(where: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Keypoints that are visible in both."""
    if first.shape != second.shape:
        raise EvalDataError(
            f"{where}: the annotations of the two pictures have {len(first)} and {len(second)} "
            "keypoints, but one category has one number; get the data set anew."
        )
    both = torch.isfinite(first).all(dim=1) & torch.isfinite(second).all(dim=1)
    return first[both], second[both]


def _read_mat(path: Path) -> tuple[Tensor, Tensor]:
    """Keypoints (K, 2), NaN where hidden, and the box (4,)."""
    scipy_io = import_extra("scipy.io", "eval", "Reading PF-PASCAL's .mat annotations")
    if not path.is_file():
        raise EvalDataError(f"{path}: no such annotation; Annotations belongs to the data set.")
    if path.stat().st_size > MAX_ANNOTATION_BYTES:
        raise EvalDataError(f"{path}: too large for an annotation; get the data set anew.")
    try:
        content: dict[str, Any] = scipy_io.loadmat(path, variable_names=("kps", "bbox"))
        points = torch.tensor(content["kps"].astype("float64")).reshape(-1, 2)
        box = torch.tensor(content["bbox"].astype("float64")).reshape(4)
    # a damaged file makes scipy raise almost anything
    except Exception as error:
        raise EvalDataError(
            f"{path}: not an annotation with kps (K, 2) and bbox (1, 4) ({error}); "
            "get the data set anew."
        ) from error
    return points, box
