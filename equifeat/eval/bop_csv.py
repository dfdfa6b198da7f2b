"""Write estimated poses as the official BOP toolkit reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from equifeat.errors import EvalDataError
from equifeat.eval.task import Prediction
from equifeat.files import atomic_file

HEADER = "scene_id,im_id,obj_id,score,R,t,time"


def write_bop_csv(file: str | Path, predictions: Iterable[tuple[str, Prediction]]) -> int:
    """Write predictions of a `bop/…` protocol as a results file (docs/bop_challenge_2019.md there).

    Args:
        file: Such as `mymethod_ycbv-test.csv`: the toolkit takes method, data set and split from
            the name.
        predictions: Id of an item, as in TaskData.items, and what TaskData.predict gave for it.

    Returns:
        How many estimates were written; failed ones are left out. The time is -1, unknown.

    Raises:
        EvalDataError: A prediction is not of a BOP protocol.
    """
    lines, count = [HEADER], 0
    for item, prediction in predictions:
        scene, _, image = item.partition("/")
        if not (scene.isdecimal() and image.isdecimal()) or "cam_from_object" not in prediction:
            raise EvalDataError(
                f"{item!r} is not an image of a BOP protocol, such as 000048/000001."
            )
        for obj, pose, score, ok in zip(
            prediction["obj_id"].tolist(),
            prediction["cam_from_object"].double(),
            prediction["score"].tolist(),
            prediction["ok"].tolist(),
            strict=True,
        ):
            if not ok:
                continue
            R = " ".join(map(repr, pose[:3, :3].flatten().tolist()))
            t = " ".join(map(repr, pose[:3, 3].tolist()))
            lines.append(f"{int(scene)},{int(image)},{obj},{score},{R},{t},-1")
            count += 1
    with atomic_file(file) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return count
