"""Readers of PF-PASCAL, PF-WILLOW and SPair-71k on files written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from equifeat.data.pf_pascal import read_pf_pascal
from equifeat.data.pf_willow import read_pf_willow
from equifeat.data.spair import read_spair
from equifeat.errors import EvalDataError

HEAD = "source_image,target_image,class,XA,YA,XB,YB\n"
# Two lines as in the published list: the second has four keypoints against five.
LINES = (
    "PF-dataset-PASCAL/JPEGImages/2010_000199.jpg,PF-dataset-PASCAL/JPEGImages/2011_003059.jpg,19,"
    "278.19;234.66;242.62;23.19;23.5,153.216;157.392;85.80;148.2;99.1,"
    "192.848;88.688;140.208;57.328;55.536,182.4;178.0;17.0;157.8;67.8\n"
    "PF-dataset-PASCAL/JPEGImages/2009_003185.jpg,PF-dataset-PASCAL/JPEGImages/2011_003146.jpg,19,"
    "217.65;249.94;3.84;3.84,191.94;34.95;112.06;95.67,"
    "149.1;27.2;112.5;269.8;265.6,147.6;147;56.4;130.2;63.6\n"
)
DIFFERENT = "test_pairs_pf_different_views.csv"


def pascal(root: Path, lines: str = LINES, name: str = DIFFERENT) -> Path:
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    (root / name).write_text(HEAD + lines, encoding="utf-8")
    return root


@pytest.mark.parametrize("inside", ["", "PF-dataset-PASCAL", "PF-PASCAL"])
def test_pf_pascal_list(tmp_path: Path, inside: str) -> None:
    pascal(tmp_path / inside)
    read = read_pf_pascal(tmp_path, "different")
    first, second = read.pairs
    assert (first.category, first.name) == ("train", "0001 train 2010_000199 2011_003059")
    assert first.source == tmp_path / inside / "JPEGImages" / "2010_000199.jpg"
    assert first.xy0.dtype == torch.float64
    assert first.xy0.shape == first.xy1.shape == (5, 2)
    assert first.xy0[2].tolist() == [242.62, 85.80]
    assert first.xy1[4].tolist() == [55.536, 67.8]
    # as the reference: the first entries of both lists
    assert second.xy0.shape == second.xy1.shape == (4, 2)
    assert second.xy1[3].tolist() == [269.8, 130.2]
    assert (read.skipped, first.box1) == (0, None)
    only = read_pf_pascal(tmp_path, "different", unequal="skip")
    assert [p.name for p in only.pairs] == [first.name]
    assert only.skipped == 1


def test_pf_pascal_mat(tmp_path: Path) -> None:
    pascal(tmp_path, LINES.splitlines()[0] + "\n", "test_pairs_pf_pascal.csv")
    folder = tmp_path / "Annotations" / "train"
    folder.mkdir(parents=True)
    nan = float("nan")
    kps = {
        "2010_000199": [[1.5, 2.0], [nan, nan], [5.0, 6.0], [7.0, 8.25]],
        "2011_003059": [[10.0, 20.0], [30.0, 40.0], [nan, nan], [70.0, 80.0]],
    }
    for name, points in kps.items():
        box = np.array([[3, 4, 250, 160]], np.uint16)
        scipy.io.savemat(folder / f"{name}.mat", {"kps": np.array(points), "bbox": box})
    read = read_pf_pascal(tmp_path, "test", "mat")
    pair = read.pairs[0]
    assert pair.xy0.tolist() == [[1.5, 2.0], [7.0, 8.25]]
    assert pair.xy1.tolist() == [[10.0, 20.0], [70.0, 80.0]]
    assert pair.box1 is not None
    assert pair.box1.tolist() == [3, 4, 250, 160]
    assert len(read.files) == 3

    (folder / "2011_003059.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(EvalDataError, match="not an annotation"):
        read_pf_pascal(tmp_path, "test", "mat")
    scipy.io.savemat(
        folder / "2011_003059.mat", {"kps": np.zeros((3, 2)), "bbox": np.zeros((1, 4))}
    )
    with pytest.raises(EvalDataError, match="4 and 3 keypoints"):
        read_pf_pascal(tmp_path, "test", "mat")
    (folder / "2011_003059.mat").unlink()
    with pytest.raises(EvalDataError, match="no such annotation"):
        read_pf_pascal(tmp_path, "test", "mat")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.jpg,b.jpg,19,1;2,3;4,5;6\n", "line 2 has 6 columns"),
        ("a.jpg,b.jpg,21,1,2,3,4\n", "class '21' is not a number from 1 to 20"),
        ("a.jpg,b.jpg,cat,1,2,3,4\n", "class 'cat'"),
        ("a.jpg,b.jpg,1,1;2,3,4,5\n", "2 x and 1 y"),
        ("a.jpg,b.jpg,1,x,3,4,5\n", "line 2: 1 x and 1 y are not equally many numbers"),
        ("a.jpg,b.jpg,1,nan,3,4,5\n", "NaN or infinite"),
        ("a/..,b.jpg,1,1,3,4,5\n", "no name of a picture"),
        ("a\\b.jpg,b.jpg,1,1,3,4,5\n", "no name of a picture"),
    ],
)
def test_bad_lines_of_pf_pascal(tmp_path: Path, line: str, said: str) -> None:
    pascal(tmp_path, line)
    with pytest.raises(EvalDataError, match=said.replace("(", r"\(")):
        read_pf_pascal(tmp_path, "different")


def test_names_never_leave_the_folder(tmp_path: Path) -> None:
    pascal(tmp_path / "set", "../../../secret/a.jpg,/elsewhere/b.jpg,1,1,3,4,5\n")
    pair = read_pf_pascal(tmp_path / "set", "different").pairs[0]
    assert pair.source == tmp_path / "set" / "JPEGImages" / "a.jpg"
    assert pair.target == tmp_path / "set" / "JPEGImages" / "b.jpg"


def test_missing_lists(tmp_path: Path) -> None:
    with pytest.raises(EvalDataError, match="no folder JPEGImages"):
        read_pf_pascal(tmp_path, "same")
    pascal(tmp_path)
    with pytest.raises(EvalDataError, match="test_pairs_pf_same_views"):
        read_pf_pascal(tmp_path, "same")
    with pytest.raises(EvalDataError, match=r"test_pairs\.csv or test_pairs_pf\.csv"):
        read_pf_willow(tmp_path)
    with pytest.raises(EvalDataError, match="Layout/large/val"):
        read_spair(tmp_path, "val")


@pytest.mark.parametrize("inside", ["", "PF-dataset"])
def test_pf_willow(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    numbers = [float(i) for i in range(40)]
    line = ",".join(["PF-dataset/car(G)/Cars_006a.png", "PF-dataset/car(G)/Cars_008b.png"])
    text = f"a,b\n{line},{','.join(map(str, numbers))}\n"
    (tmp_path / "test_pairs_pf.csv").write_text(text, encoding="utf-8")
    pair = read_pf_willow(tmp_path).pairs[0]
    assert pair.category == "car(G)"
    assert pair.target == tmp_path / inside / "car(G)" / "Cars_008b.png"
    assert pair.xy0.tolist() == [[i, 10 + i] for i in range(10)]
    assert pair.xy1.tolist() == [[20 + i, 30 + i] for i in range(10)]
    (tmp_path / "test_pairs_pf.csv").write_text(text.replace(",39.0", ""), encoding="utf-8")
    with pytest.raises(EvalDataError, match="41 columns"):
        read_pf_willow(tmp_path)


PAIR = {
    "filename": "000001-2008_000001-2008_000002:cat",
    "category": "cat",
    "src_imname": "2008_000001.jpg",
    "trg_imname": "2008_000002.jpg",
    "trg_bndbox": [10, 20, 110, 70],
    "src_kps": [[1, 2], [3, 4]],
    "trg_kps": [[5, 6], [7, 8]],
    "viewpoint_variation": 2,
    "scale_variation": 0,
    "truncation": 3,
    "occlusion": 1,
}


def spair(root: Path, **changes: object) -> Path:
    for folder in ("Layout/large", "PairAnnotation/test"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "Layout/large/test.txt").write_text(f"{PAIR['filename']}\n", encoding="utf-8")
    content = {k: v for k, v in {**PAIR, **changes}.items() if v is not None}
    file = root / "PairAnnotation/test" / f"{PAIR['filename']}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return root


def test_spair(tmp_path: Path) -> None:
    spair(tmp_path / "SPair-71k", src_imname=None)
    pair = read_spair(tmp_path).pairs[0]
    assert pair.name == PAIR["filename"]
    assert pair.source == tmp_path / "SPair-71k" / "JPEGImages" / "cat" / "2008_000001.jpg"
    assert pair.xy1.tolist() == [[5.0, 6.0], [7.0, 8.0]]
    assert pair.box1 is not None
    assert pair.box1.tolist() == [10, 20, 110, 70]
    assert pair.labels == {
        "viewpoint": "2 hard",
        "scale": "0 easy",
        "truncation": "3 both",
        "occlusion": "1 source",
    }
    file = tmp_path / "SPair-71k/PairAnnotation/test" / f"{PAIR['filename']}.json"
    file.rename(file.with_name(file.name.replace(":", "_")))
    assert read_spair(tmp_path).pairs[0].xy0.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    "changes",
    [
        {"category": None},
        {"category": "../x/.."},
        {"trg_kps": [[5, 6]]},
        {"trg_kps": [[5], [7]]},
        {"trg_kps": "none"},
        {"trg_bndbox": [1, 2]},
        {"trg_bndbox": {"a": 1}},
        {"truncation": 9},
        {"occlusion": [0]},
        {"src_imname": 7},
    ],
)
def test_bad_annotations_of_spair(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(EvalDataError):
        read_spair(spair(tmp_path, **changes))


def test_sizes_and_encodings_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spair(tmp_path)
    file = next((tmp_path / "PairAnnotation/test").iterdir())
    file.write_bytes(b"[" * 100_000)
    with pytest.raises(EvalDataError, match="not a pair annotation"):
        read_spair(tmp_path)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(EvalDataError, match="cannot be read"):
        read_spair(tmp_path)
    monkeypatch.setattr("equifeat.data.spair.MAX_ANNOTATION_BYTES", 100)
    file.write_bytes(b" " * 101)
    with pytest.raises(EvalDataError, match="101 bytes are more than the 100"):
        read_spair(tmp_path)
