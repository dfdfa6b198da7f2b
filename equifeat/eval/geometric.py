"""Geometric correspondence: recall by view change, homographies, relative poses."""

from __future__ import annotations

from pathlib import Path

from equifeat.errors import EvalDataError
from equifeat.eval.data_hash import SUMS, check_sums
from equifeat.eval.geometric_depth import PROTOCOLS as DEPTH
from equifeat.eval.geometric_depth import DepthPairs, NaviOptions
from equifeat.eval.geometric_homography import PROTOCOLS as HOMOGRAPHY
from equifeat.eval.geometric_homography import HomographyOptions, PlanePairs
from equifeat.eval.geometric_pose import PROTOCOLS as POSE
from equifeat.eval.geometric_pose import PosePairs
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import Check, Task

# Files named one by one in a check.
_NAMED = 10

WHERE = {
    "navi": (
        "NAVI is navi_v1.tar.gz of github.com/google/navi; the folder must hold "
        "OBJECT/wild_set and OBJECT/multiview_*, each with images, depth and annotations.json."
    ),
    "scannet": (
        "The pairs are scannet_test_1500.tar of github.com/zju3dv/LoFTR (ScanNet's terms are to be "
        "accepted at scan-net.org first) with test.npz and intrinsics.npz of its "
        "assets/scannet_test_1500; the folder must hold these two and "
        "SCENE/{color/N.jpg,depth/N.png,pose/N.txt}."
    ),
    "hpatches": (
        "HPatches is hpatches-sequences-release.tar.gz of github.com/hpatches/hpatches-dataset; "
        "the folder must hold i_NAME and v_NAME, each with 1.ppm to 6.ppm and H_1_2 to H_1_6."
    ),
    "graf": (
        "The set is at robots.ox.ac.uk/~vgg/research/affine; the folder must hold graf, wall and "
        "so on, each with img1.ppm to img6.ppm and H1to2p to H1to6p, or be one of them."
    ),
    "image-pairs": (
        "The folder must hold a list *pairs*.txt of 38 columns a line, such as "
        "assets/scannet_test_pairs_with_gt.txt of "
        "github.com/magicleap/SuperGluePretrainedNetwork, and the pictures that it names."
    ),
}


def open_geometric(root: Path, protocol: Protocol) -> DepthPairs | PlanePairs | PosePairs:
    """Open a data set of image pairs under a protocol.

    Args:
        root: Its folder.
        protocol: One of `GEOMETRIC`'s, perhaps changed.

    Returns:
        The data.

    Raises:
        EvalDataError: The folder does not hold it.
        RecipeError: An option makes no sense.
    """
    family = protocol.id.split("/")[0]
    try:
        if family in ("hpatches", "graf"):
            return PlanePairs(root, protocol)
        if family == "image-pairs":
            return PosePairs(root, protocol)
        return DepthPairs(root, protocol)
    except EvalDataError as error:
        raise EvalDataError(f"{str(error).rstrip('.')}. {WHERE[family]}") from error


def check_geometric(root: Path, protocol: Protocol) -> Check:
    """Count pairs and files, look for missing ones, and compare hashes.

    Args:
        root: Folder of the data set.
        protocol: One of `GEOMETRIC`'s, perhaps changed.

    Returns:
        What was found.

    Raises:
        EvalDataError: The folder does not hold the data.
    """
    data = open_geometric(root, protocol)
    files = data.pictures()
    missing = [file for file in files if not file.is_file()]
    compared, problems = check_sums(root)
    problems += [f"{file} is missing" for file in missing[:_NAMED]]
    if len(missing) > _NAMED:
        problems.append(f"{len(missing) - _NAMED} further files are missing")
    notes = [] if compared else [f"no {SUMS}; data hash {data.data_hash}"]
    counts, said = {"pairs": len(data.items)}, ""
    if isinstance(data, PlanePairs):
        counts["sequences"] = len({pair.sequence for pair in data.pairs})
        said = _official(data.options, counts["sequences"])
    elif isinstance(data, PosePairs):
        counts["scenes"] = len({pair.scene for pair in data.pairs})
    elif isinstance(data.options, NaviOptions):
        counts["objects"] = len({pair.view0.obj for pair in data.pairs})
        if counts["objects"] != 36:
            # the paper's number; which of them have both kinds of sets is not said
            notes.append(f"NAVI has 36 objects, here are {counts['objects']}")
    else:
        counts["scenes"] = len({pair.scene for pair in data.pairs})
        if counts["pairs"] != 1500:
            said = f"the published list has 1500 pairs, this one {counts['pairs']}"
    if said:
        # a folder with hashes of its own, such as a fixture, is whole as it is
        (notes if compared else problems).append(said)
    return Check({**counts, "files": len(files), "files compared": compared}, problems, notes)


def _official(options: HomographyOptions, sequences: int) -> str:
    """HPatches has 57 sequences of light and 59 of viewpoint (Balntas et al., CVPR 2017)."""
    official = {True: 116, False: 108}[options.large]
    if options.layout == "oxford" or sequences == official:
        return ""
    return f"HPatches has {official} such sequences, here are {sequences}"


GEOMETRIC = Task("geometric", (*DEPTH, *HOMOGRAPHY, *POSE), open_geometric, check_geometric, WHERE)
