"""Pairs with keypoints under a protocol: descriptors of the source looked for in the target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from equifeat.data.pf_pascal import read_pf_pascal
from equifeat.data.pf_willow import read_pf_willow
from equifeat.data.semantic_pairs import KeypointPair, PairList
from equifeat.data.spair import read_spair
from equifeat.errors import EvalDataError, ImageError, RecipeError
from equifeat.eval.data_hash import data_hash
from equifeat.eval.features import FeatureSource
from equifeat.eval.locate import MatchSpec, locate
from equifeat.eval.locate_dot import corner_places, locate_dot
from equifeat.eval.protocol import Protocol
from equifeat.eval.semantic_frame import Frame, frame_of, show
from equifeat.eval.semantic_picture import pair_picture
from equifeat.eval.semantic_protocols import AVERAGES, SemanticOptions, averages_of
from equifeat.eval.task import Prediction, Row, TaskData
from equifeat.geometry.pixels import SizeHW, patch_centers
from equifeat.image_files import read_image
from equifeat.metrics.keypoints import correct_keypoints, pair_weights, pck_length
from equifeat.model.feature_map import FeatureMap
from equifeat.seeding import torch_generator

WHERE: Mapping[str, str] = {
    "pf-pascal": (
        "PF-PASCAL is PF-dataset-PASCAL.zip of di.ens.fr/willow/research/proposalflow; the folder "
        "must hold JPEGImages, Annotations/CLASS/*.mat and test_pairs.csv, or for mef-840 "
        "test_pairs_pf_{different,same}_views.csv of github.com/qq456cvb/3DCorrEnhance (data/)."
    ),
    "pf-willow": (
        "PF-WILLOW is PF-dataset.zip of di.ens.fr/willow/research/proposalflow; the folder must "
        "hold test_pairs.csv (test_pairs_pf.csv) and CLASS/*.png, perhaps in PF-dataset."
    ),
    "spair": (
        "SPair-71k is SPair-71k.tar.gz of cvlab.postech.ac.kr/research/SPair-71k; the folder must "
        "hold Layout/large, PairAnnotation and JPEGImages."
    ),
}


class _Seen(NamedTuple):
    """A picture as the model saw it: its size, its frame, its features."""

    size_hw: SizeHW
    frame: Frame
    features: FeatureMap


class SemanticData(TaskData):
    """Pairs with keypoints.

    Args:
        root: Folder of the data set.
        protocol: One of equifeat.eval.semantic's.
    """

    def __init__(self, root: Path, protocol: Protocol) -> None:
        self.options: SemanticOptions = protocol.options
        if self.options.similarity == "dot" and self.options.method != "nearest":
            raise RecipeError(f"method={self.options.method} needs similarity=cosine.")
        self.list = _read(root, protocol)
        told = [pair for pair in self.list.pairs if len(pair.xy0)]
        self.pairs = _drawn(told, self.options.per_category, protocol.seed)
        self._held: tuple[FeatureSource, Path, _Seen] | None = None
        self._averages = averages_of(protocol)
        counts, categories = [len(p.xy0) for p in self.pairs], [p.category for p in self.pairs]
        self._weights = {
            mean: pair_weights(counts, categories, mean)
            for _, mean in AVERAGES.values()
            if mean is not None
        }
        pictures = {p for pair in self.pairs for p in (pair.source, pair.target) if p.is_file()}
        digest = data_hash(root, self.list.files, pictures)
        super().__init__(root, protocol, [pair.name for pair in self.pairs], digest)

    def predict(self, index: int, source: FeatureSource) -> Prediction:
        """Return where the keypoints were found, in pixels of the target; see TaskData."""
        pair, options = self.pairs[index], self.options
        size0, frame0, map0 = self._seen(pair.source, source)
        size1, frame1, map1 = self._seen(pair.target, source, hold=False)
        xy0 = frame0.carry(pair.xy0).float()
        descriptors = map0.sample(xy0[None].to(source.device))[0]
        grid, dot = _grid(frame1, options.grid), options.similarity == "dot"
        places = map1.centers()
        if grid is not None:
            places = (corner_places if dot else patch_centers)(grid, frame1.size_hw, places.device)
        mask = None if options.search_padding else _content(frame1, places)
        if dot:
            found = locate_dot(descriptors, map1, places, mask)
        else:
            spec = MatchSpec(options.method, options.temperature, options.window, options.dtype)
            found = locate(descriptors, map1, spec, grid, mask)
        return {
            "xy": frame1.back(found.xy.cpu().double()),
            "similarity": found.similarity.cpu().float(),
            "sizes_hw": torch.tensor([size0, size1]),
        }

    def score(self, index: int, prediction: Prediction) -> list[Row]:
        """Return one row, the pair's PCK; see TaskData."""
        pair = self.pairs[index]
        found, true, length = self._in_frame(index, prediction)
        values, weights = {}, {}
        for name, (alpha, average) in self._averages.items():
            correct = correct_keypoints(found, true, length, alpha)
            values[name] = 100.0 * float(correct.double().mean())
            mean = AVERAGES[average][1]
            if mean is not None:
                weights[name] = self._weights[mean][index]
        labels = {"category": pair.category, **pair.labels}
        return [Row(pair.name, pair.name, values, weights, labels)]

    def picture(self, index: int, prediction: Prediction) -> Image.Image | None:
        """Draw where the keypoints were found, coloured by their error; see TaskData."""
        pair = self.pairs[index]
        found, true, length = self._in_frame(index, prediction)
        row = self.score(index, prediction)[0]
        name, value = next(iter(row.values.items()))
        return pair_picture(
            _read_image(pair.source),
            _read_image(pair.target),
            pair.xy0,
            prediction["xy"],
            pair.xy1,
            (found - true).norm(dim=-1) / length,
            label=f"error / {self.options.basis}",
            title=f"{name.split(' ')[0]} {value:.0f} %",
            category=pair.category,
        )

    def caption(self) -> str:
        """See TaskData."""
        options = self.options
        basis = {
            "image": "the longer side of the target image",
            "box": "the longer side of the object's box in the target image",
            "box-kp": "the longer side of the box around the target's keypoints",
        }[options.basis]
        empty = sum(not len(pair.xy0) for pair in self.list.pairs)
        left_out = ""
        if self.list.skipped:
            left_out += f" {self.list.skipped} pairs with two numbers of keypoints are left out."
        if empty:
            left_out += f" {empty} pairs without a keypoint in both pictures are left out."
        return (
            f"{len(self.pairs)} pairs with {sum(len(p.xy0) for p in self.pairs)} keypoints of "
            f"{len({p.category for p in self.pairs})} categories; PCK@α counts keypoints found "
            f"within α times {basis}; intervals over pairs, though pictures recur in "
            f"pairs.{left_out}"
        )

    def _seen(self, path: Path, source: FeatureSource, hold: bool = True) -> _Seen:
        """A picture's features; those of the last source are held, whose pairs follow another."""
        held = self._held
        if held is not None and held[0] is source and held[1] == path:
            return held[2]
        image = _read_image(path)
        size_hw = int(image.shape[-2]), int(image.shape[-1])
        frame = self._frame(size_hw)
        seen = _Seen(size_hw, frame, source(show(image, frame, self.options.fill)))
        if hold:
            self._held = source, path, seen
        return seen

    def _frame(self, size_hw: SizeHW) -> Frame:
        return frame_of(size_hw, self.options.fit, self.options.side)

    def _in_frame(self, index: int, prediction: Prediction) -> tuple[Tensor, Tensor, float]:
        """Found and true keypoints as the model saw them, and what α multiplies there."""
        pair = self.pairs[index]
        h, w = prediction["sizes_hw"][1].tolist()
        frame = self._frame((h, w))
        true = frame.carry(pair.xy1)
        box = None if pair.box1 is None else frame.carry(pair.box1.reshape(2, 2)).reshape(4)
        shown = (h * frame.scale_xy[1], w * frame.scale_xy[0])
        return frame.carry(prediction["xy"]), true, pck_length(self.options.basis, shown, true, box)


def _read(root: Path, protocol: Protocol) -> PairList:
    options: SemanticOptions = protocol.options
    family = family_of(protocol)
    try:
        if family == "pf-pascal":
            read = read_pf_pascal(root, options.pairs, options.annotations, options.unequal)
        elif family == "pf-willow":
            read = read_pf_willow(root)
        else:
            read = read_spair(root, options.split)
    except EvalDataError as error:
        raise EvalDataError(f"{str(error).rstrip('.')}. {WHERE[family]}") from error
    if options.basis == "box" and any(pair.box1 is None for pair in read.pairs):
        raise EvalDataError(
            f"{root}: basis=box needs boxes, which "
            + ("only annotations=mat has." if family == "pf-pascal" else "this data set has not.")
        )
    return read


def family_of(protocol: Protocol) -> str:
    """Return the data set of a protocol.

    Args:
        protocol: One of equifeat.eval.semantic_protocols.PROTOCOLS.

    Returns:
        The part of its id before "/".
    """
    return protocol.id.split("/")[0]


def _drawn(pairs: Sequence[KeypointPair], count: int, seed: int) -> list[KeypointPair]:
    """At most ``count`` pairs of each category, in the order of the list."""
    if count < 1:
        return list(pairs)
    order = torch.randperm(len(pairs), generator=torch_generator(seed)).tolist()
    taken: Counter[str] = Counter()
    kept = []
    for index in order:
        if taken[pairs[index].category] < count:
            taken[pairs[index].category] += 1
            kept.append(index)
    return [pairs[index] for index in sorted(kept)]


def _read_image(path: Path) -> Tensor:
    try:
        return read_image(path)
    except ImageError as error:
        raise EvalDataError(f"{error}; get the data set anew") from error


def _grid(frame: Frame, points: int) -> SizeHW | None:
    if not points:
        return None
    h, w = frame.size_hw
    return max(1, round(points * h / max(h, w))), max(1, round(points * w / max(h, w)))


def _content(frame: Frame, xy: Tensor) -> Tensor:
    """(h, w) bool: which of (h, w, 2) places lie on the picture."""
    low = xy.new_tensor(frame.offset_xy)
    high = low + xy.new_tensor(frame.content_hw[::-1])
    return ((xy >= low) & (xy < high)).all(dim=-1)
