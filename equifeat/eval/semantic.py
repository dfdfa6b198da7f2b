"""Semantic correspondence: keypoints of one object looked for on another of its category."""

from __future__ import annotations

from pathlib import Path

from equifeat.eval.data_hash import SUMS, check_sums
from equifeat.eval.protocol import Protocol
from equifeat.eval.semantic_data import WHERE, SemanticData, family_of
from equifeat.eval.semantic_protocols import PROTOCOLS
from equifeat.eval.task import Check, Task

# Pairs of the published lists: 3DCorrEnhance's own class weights sum to 299; PF-WILLOW has 90 pairs
# of each of 10 classes; SPair-71k's test split is in its paper, table 2.
_OFFICIAL = {
    ("pf-pascal", "different"): 299,
    ("pf-willow", "test"): 900,
    ("spair", "test"): 12234,
}


def open_semantic(root: Path, protocol: Protocol) -> SemanticData:
    """Open a data set of keypoint pairs under a protocol.

    Args:
        root: Its folder.
        protocol: One of `SEMANTIC`'s.

    Returns:
        The data.

    Raises:
        EvalDataError: The folder does not hold it.
    """
    return SemanticData(root, protocol)


def check_semantic(root: Path, protocol: Protocol) -> Check:
    """Count pairs and pictures, look for missing ones, and compare hashes.

    Args:
        root: Folder of the data set.
        protocol: One of `SEMANTIC`'s.

    Returns:
        What was found.
    """
    data = open_semantic(root, protocol)
    pairs = data.list.pairs
    pictures = sorted({p for pair in pairs for p in (pair.source, pair.target)})
    missing = [p for p in pictures if not p.is_file()]
    compared, problems = check_sums(root)
    problems += [f"{path} is missing" for path in missing[:10]]
    if len(missing) > 10:
        problems.append(f"{len(missing) - 10} further pictures are missing")
    problems += [
        f"{p.name}: no keypoint is visible in both pictures" for p in pairs if not len(p.xy0)
    ]
    notes = [] if compared else [f"no {SUMS}; data hash {data.data_hash}"]
    family, options = family_of(protocol), data.options
    part = {"pf-pascal": options.pairs, "spair": options.split}.get(family, "test")
    official, listed = _OFFICIAL.get((family, part)), len(pairs) + data.list.skipped
    if official is not None and official != listed:
        said = f"the published list has {official} pairs, this one {listed}"
        # a list with hashes of its own, such as a fixture, is whole as it is
        (notes if compared else problems).append(said)
    counts = {
        "pairs": listed,
        "keypoints": sum(len(p.xy0) for p in pairs),
        "categories": len({p.category for p in pairs}),
        "pictures": len(pictures),
        "files compared": compared,
    }
    return Check(counts, problems, notes)


SEMANTIC = Task("semantic", PROTOCOLS, open_semantic, check_semantic, WHERE)
