"""PF-WILLOW (Ham et al., "Proposal Flow", CVPR 2016): 900 pairs, ten keypoints each, one CSV.

A line is two pictures, ten XA, ten YA, ten XB, ten YB; names are `PF-dataset/CLASS/FILE`
(github.com/juhongm999/dhpf, data/pfwillow.py).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from equifeat.data.semantic_pairs import KeypointPair, PairList, points_of
from equifeat.data.text_files import MAX_LIST_BYTES, plain_name, read_text
from equifeat.errors import EvalDataError

LISTS = ("test_pairs.csv", "test_pairs_pf.csv")
KEYPOINTS = 10


def read_pf_willow(root: Path) -> PairList:
    """Read the pairs of PF-WILLOW.

    Args:
        root: Folder with the list, and the classes' folders in it or in PF-dataset.

    Returns:
        The pairs; their category is the name of the folder.

    Raises:
        EvalDataError: A file is missing or not in its format.
    """
    places = (root, root / "PF-WILLOW", root / "PF-dataset")
    path = next((p / n for p in places for n in LISTS if (p / n).is_file()), None)
    if path is None:
        raise EvalDataError(f"{root} holds no list of pairs {' or '.join(LISTS)}")
    base = path.parent
    pictures = base / "PF-dataset" if (base / "PF-dataset").is_dir() else base
    found = []
    reader = csv.reader(io.StringIO(read_text(path, MAX_LIST_BYTES)))
    next(reader, None)
    for row in reader:
        where = f"{path}: line {reader.line_num}"
        if not row:
            continue
        if len(row) != 2 + 4 * KEYPOINTS:
            raise EvalDataError(
                f"{where} has {len(row)} columns, not two pictures and {4 * KEYPOINTS} coordinates."
            )
        files = []
        for name in row[:2]:
            folder, _, _ = name.strip().rpartition("/")
            files.append((plain_name(where, folder), plain_name(where, name)))
        numbers = [row[2 + k * KEYPOINTS : 2 + (k + 1) * KEYPOINTS] for k in range(4)]
        (category, source), (other, target) = files
        found.append(
            KeypointPair(
                f"{reader.line_num - 1:04d} {category} {Path(source).stem} {Path(target).stem}",
                pictures / category / source,
                pictures / other / target,
                category,
                points_of(where, *numbers[:2]),
                points_of(where, *numbers[2:]),
            )
        )
    return PairList(found, [path])
