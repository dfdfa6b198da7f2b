"""The task "pose": where known objects are, by matching descriptors and PnP."""

from __future__ import annotations

from pathlib import Path

from equifeat.eval import pose_bop, pose_onepose
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import Check, Task, TaskData


def open_pose(root: Path, protocol: Protocol) -> TaskData:
    """Open a data set under a protocol of its family.

    Args:
        root: Folder of the data set.
        protocol: One of `POSE`'s, perhaps changed.

    Returns:
        The data.

    Raises:
        EvalDataError: The folder does not hold the data.
        RecipeError: An option makes no sense.
    """
    if _family(protocol) == "bop":
        return pose_bop.open_bop(root, protocol)
    return pose_onepose.open_onepose(root, protocol)


def check_pose(root: Path, protocol: Protocol) -> Check:
    """Count and verify a data set under a protocol of its family.

    Args:
        root: Folder of the data set.
        protocol: One of `POSE`'s, perhaps changed.

    Returns:
        What was found.

    Raises:
        EvalDataError: The folder does not hold the data.
    """
    if _family(protocol) == "bop":
        return pose_bop.check_bop(root, protocol)
    return pose_onepose.check_onepose(root, protocol)


def _family(protocol: Protocol) -> str:
    return protocol.id.partition("/")[0]


POSE = Task(
    name="pose",
    protocols=(*pose_onepose.PROTOCOLS, *pose_bop.PROTOCOLS),
    open=open_pose,
    check=check_pose,
    where={**pose_onepose.WHERE, **pose_bop.WHERE},
)
