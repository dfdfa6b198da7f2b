"""A protocol never changes under its id; what a user changes gets an id of its own.

`python -m tests.eval.test_protocols` adds protocols that are new to protocols.json. It never
replaces a digest: a changed protocol needs a new id, or a higher version and its line removed by
hand.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from equifeat.errors import RecipeError
from equifeat.eval.harness import find_protocol
from equifeat.eval.protocol import FeatureSpec, Metric, Protocol
from equifeat.eval.task_equivariance import EQUIVARIANCE, EquivarianceOptions
from equifeat.eval.tasks import TASKS, find_task

DIGESTS = Path(__file__).with_name("protocols.json")


def current() -> dict[str, str]:
    return {p.id: p.digest() for name in TASKS for p in find_task(name).protocols}


def test_no_protocol_changed_without_a_new_id() -> None:
    kept, now = json.loads(DIGESTS.read_text()), current()
    changed = sorted(name for name in now if name in kept and kept[name] != now[name])
    assert not changed, f"{changed} changed: give what changed a new id"
    missing = sorted(now.keys() - kept.keys())
    assert not missing, f"{missing} are new: run python -m tests.eval.test_protocols"
    gone = sorted(kept.keys() - now.keys())
    assert not gone, f"{gone} were published and are gone"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_whole(name: str) -> None:
    task = find_task(name)
    assert task.name == name
    ids = [p.id for p in task.protocols]
    assert len(set(ids)) == len(ids)
    for protocol in task.protocols:
        assert protocol.task == name
        assert protocol.id.count("/") == 1
        assert "+" not in protocol.id
        assert task.where[protocol.id.split("/")[0]]
        names = [metric.name for metric in protocol.metrics]
        assert len(set(names)) == len(names)
        assert protocol.about
        assert protocol.source
        for model, values in protocol.published.items():
            assert set(values) <= set(names), (protocol.id, model)


SAMPLE = Protocol(
    "views/sample",
    "equivariance",
    "a sample",
    "nowhere",
    (Metric("PCDP@.10"),),
    "object",
    FeatureSpec(resolution=32),
    EquivarianceOptions(),
    published={"m": {"PCDP@.10": 1.0}},
)


def test_changes_are_in_the_id_and_drop_published_numbers() -> None:
    changed = SAMPLE.changed({"points": "dense", "layers": "[-4,-1]", "seed": "3", "scale": "2"})
    assert changed.id == "views/sample+layers=[-4,-1],points=dense,scale=2.0,seed=3"
    assert changed.features == FeatureSpec(resolution=32, layers=(-4, -1), scale=2.0)
    assert changed.options.points == "dense"
    assert changed.seed == 3
    assert not changed.published
    assert changed.digest() != SAMPLE.digest()
    assert SAMPLE.changed({"points": "500", "resolution": "32"}) is SAMPLE
    assert SAMPLE.changed({"resolution": "null"}).features.resolution is None


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("pionts", "3", "no option 'pionts'.*Did you mean points"),
        ("points", "sparse", r"points=sparse must be"),
        ("points", "2.5", r"points=2.5 must be"),
        ("pairs", "true", "pairs=true must be"),
        ("normalizer", "boxes", "normalizer=boxes must be one of box, image"),
        ("layers", "-1", "layers=-1 must be"),
        ("norm", "1", "norm=1 must be true or false"),
        ("scale", "big", "scale=big must be a number"),
        ("seed", "x", "seed=x must be a whole number"),
    ],
)
def test_wrong_changes_are_named(option: str, value: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        SAMPLE.changed({option: value})


def test_the_digest_covers_what_numbers_depend_on_and_nothing_else() -> None:
    same = dataclasses.replace(SAMPLE, about="other words", source="there", published={})
    assert same.digest() == SAMPLE.digest()
    others: list[dict[str, Any]] = [
        {"metrics": (Metric("PCDP@.10", mean="rows"),)},
        {"unit": "pair"},
        {"version": 2},
        {"seed": 1},
        {"features": FeatureSpec(resolution=33)},
        {"options": EquivarianceOptions(points=5)},
    ]
    digests = {dataclasses.replace(SAMPLE, **other).digest() for other in others}
    assert len(digests | {SAMPLE.digest()}) == len(others) + 1


def test_protocols_are_found_by_id() -> None:
    assert find_protocol(EQUIVARIANCE, None).id == "views/box-500"
    assert find_protocol(EQUIVARIANCE, "views/quick", ["pairs=7"]).id == "views/quick+pairs=7"
    with pytest.raises(RecipeError, match=r"no protocol 'views/quik'.*Did you mean views/quick"):
        find_protocol(EQUIVARIANCE, "views/quik")
    with pytest.raises(RecipeError, match="option=value"):
        find_protocol(EQUIVARIANCE, None, ["pairs"])
    with pytest.raises(RecipeError, match=r"no task 'semantics'.*Did you mean semantic"):
        find_task("semantics")


if __name__ == "__main__":
    now = current()
    kept = json.loads(DIGESTS.read_text()) if DIGESTS.is_file() else {}
    DIGESTS.write_text(json.dumps(dict(sorted({**now, **kept}.items())), indent=1) + "\n")
