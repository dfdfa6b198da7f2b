"""The protocol with an oracle, with chance, and its bookkeeping."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from equifeat.errors import CorrespondenceError, RecipeError
from equifeat.eval.equivariance import HasDense, evaluate_equivariance
from equifeat.eval.equivariance_result import EquivarianceResult, PairScore
from tests.eval.spheres import RADIUS, Oracle, RandomFeatures, Sphere

OBJECTS = [Sphere("a"), Sphere("b", (10, 45, 80))]


@pytest.fixture(scope="module")
def both() -> EquivarianceResult:
    models: dict[str, HasDense] = {"oracle": Oracle(*OBJECTS), "random": RandomFeatures()}
    return evaluate_equivariance(models, OBJECTS, points="dense", target_stride=1)


def test_the_oracle_is_nearly_perfect(both: EquivarianceResult) -> None:
    summary = both.summary("oracle")
    assert summary["PCDP@.05"].mean >= 99.0
    assert summary["PCDP@.20"].mean >= 99.9
    # Half a pixel of a box of about 45 px is the limit of matching to pixel centres.
    assert summary["APE"].mean < 1.5


def test_random_features_score_at_chance(both: EquivarianceResult) -> None:
    """Chance: a uniformly drawn mask pixel, computed here from the masks and true points."""
    chance = []
    generator = torch.Generator().manual_seed(1)
    for row in both.rows:
        obj = next(o for o in OBJECTS if o.name == row.object_name)
        mask = obj.view(row.view1).mask
        at = mask.nonzero().flip(-1) + 0.5
        side = float((at.amax(0) - at.amin(0)).max()) + 1.0
        true = at[torch.randint(len(at), (2000,), generator=generator)]
        drawn = at[torch.randint(len(at), (2000,), generator=generator)]
        chance.append(float(((true - drawn).norm(dim=-1) / side <= 0.2).float().mean()) * 100.0)
    expected = sum(chance) / len(chance)
    assert both.summary("random")["PCDP@.20"].mean == pytest.approx(expected, abs=3.0)
    assert both.summary("random")["PCDP@.05"].mean < 2.0


def test_rows_and_means(both: EquivarianceResult) -> None:
    assert len(both.rows) == 12
    assert both.metrics == ("APE", "PCDP@.05", "PCDP@.10", "PCDP@.20")
    changes = {round(r.view_change_deg, 3) for r in both.rows if r.object_name == "a"}
    assert len(changes) == 3
    values = both.object_values("oracle")
    assert values.shape == (2, 4)
    mine = [r.scores["oracle"][0] for r in both.rows if r.object_name == "b"]
    assert float(values[1, 0]) == pytest.approx(sum(mine) / len(mine))
    assert (
        sum(
            sum(r.object_name == "a" and low <= r.view_change_deg < high for r in both.rows)
            for low, high in both.bins
        )
        == 6
    )
    assert both.object_values("oracle", (15.0, 30.0)).shape == (1, 4)


def test_view_change_is_the_angle_between_the_cameras(both: EquivarianceResult) -> None:
    level = evaluate_equivariance(Oracle(OBJECTS[0]), OBJECTS[:1], pairs=1, seed=3)
    assert 0.0 < level.rows[0].view_change_deg < 50.0
    assert level.models == ("model",)


def test_paired_difference(both: EquivarianceResult) -> None:
    gain = both.difference("random", "oracle")
    assert gain["PCDP@.10"].low > 50.0
    assert gain["APE"].high < -20.0
    assert gain["APE"].mean == pytest.approx(
        both.summary("oracle")["APE"].mean - both.summary("random")["APE"].mean
    )


def test_features_of_a_view_are_computed_once() -> None:
    oracle = Oracle(*OBJECTS)
    evaluate_equivariance(oracle, OBJECTS, points=20)
    assert oracle.calls == 6


def test_seed_decides_and_other_objects_do_not() -> None:
    def rows(objects: list[Sphere], seed: int) -> list[PairScore]:
        found = evaluate_equivariance(
            Oracle(*objects), objects, pairs=2, points=30, target_stride=1, seed=seed
        )
        return [r for r in found.rows if r.object_name == "b"]

    assert rows(OBJECTS, 0) == rows(OBJECTS, 0) == rows(OBJECTS[1:], 0)
    assert [rows(OBJECTS, s) for s in range(1, 5)] != [rows(OBJECTS, 0)] * 4
    assert len(rows(OBJECTS, 0)) == 2
    assert all(r.points == 30 for r in rows(OBJECTS, 0))


def test_stride_and_budget() -> None:
    oracle = Oracle(*OBJECTS)
    full = evaluate_equivariance(oracle, OBJECTS, points=100, target_stride=1)
    small = evaluate_equivariance(oracle, OBJECTS, points=100, target_stride=1, budget_bytes=20_000)
    assert full.rows == small.rows
    coarse = evaluate_equivariance(oracle, OBJECTS, points=100, target_stride=4)
    assert full.summary("model")["APE"].mean < coarse.summary("model")["APE"].mean < 5.0


def test_image_normalizer_gives_smaller_numbers() -> None:
    oracle = Oracle(*OBJECTS)
    box = evaluate_equivariance(oracle, OBJECTS, points=50)
    image = evaluate_equivariance(oracle, OBJECTS, points=50, normalizer="image")
    assert image.summary("model")["APE"].mean < box.summary("model")["APE"].mean
    assert "the object's box" in box.caption()
    assert "the target image" in image.caption()
    assert RADIUS == 0.5
    with pytest.raises(RecipeError, match=r"normalizer='image'|normalizer='box'"):
        box.merged(image)


def test_angle_limits_and_no_covisible_pixel() -> None:
    oracle = Oracle(*OBJECTS)
    near = evaluate_equivariance(oracle, OBJECTS[:1], max_angle_deg=25.0, points=20)
    assert {(r.view0, r.view1) for r in near.rows} == {(0, 1), (1, 0)}
    opposite = Sphere("c", (0, 180))
    with pytest.raises(CorrespondenceError, match="no pair of views of c"):
        evaluate_equivariance(Oracle(opposite), [opposite])
    with pytest.raises(CorrespondenceError, match="no pair"):
        evaluate_equivariance(oracle, OBJECTS, min_angle_deg=100.0)


def test_options_that_make_no_sense() -> None:
    oracle = Oracle(*OBJECTS)
    with pytest.raises(RecipeError, match="named 'a'"):
        evaluate_equivariance(oracle, [OBJECTS[0], OBJECTS[0]])
    with pytest.raises(RecipeError, match="pairs=0"):
        evaluate_equivariance(oracle, OBJECTS, pairs=0)
    with pytest.raises(RecipeError, match="target_stride=0"):
        evaluate_equivariance(oracle, OBJECTS, target_stride=0)
    with pytest.raises(RecipeError, match="0 objects"):
        evaluate_equivariance(oracle, [])
    with pytest.raises(RecipeError, match="no view change"):
        evaluate_equivariance(oracle, OBJECTS, min_angle_deg=50.0, max_angle_deg=20.0)


def test_progress_wraps_the_objects() -> None:
    seen: list[str] = []

    def progress(items: object, what: str) -> list[Sphere]:
        seen.append(what)
        return OBJECTS

    evaluate_equivariance(Oracle(*OBJECTS), OBJECTS, points=20, progress=progress)
    assert seen == ["equivariance"]


def test_json_round_trip(both: EquivarianceResult, tmp_path: Path) -> None:
    both.save(tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    again = EquivarianceResult.from_json(text)
    assert again == both
    data = json.loads(text)
    assert data["config"]["normalizer"] == "box"
    assert data["summary"]["oracle"]["all"]["APE"]["mean"] == both.summary("oracle")["APE"].mean
    for wrong in ("{}", "[]", "no json", text.replace('"version": 1', '"version": 9')):
        with pytest.raises(RecipeError):
            EquivarianceResult.from_json(wrong)


def test_merging_results() -> None:
    def one(name: str, **options: int) -> EquivarianceResult:
        return evaluate_equivariance(
            Oracle(*OBJECTS),
            OBJECTS,
            name=name,
            pairs=2,
            points=30,
            **options,  # type: ignore[arg-type]
        )

    joined = one("x").merged(one("y"), one("z"))
    assert joined.models == ("x", "y", "z")
    assert joined.difference("x", "y")["APE"] == (0.0, 0.0, 0.0)
    with pytest.raises(RecipeError, match="seed=0 and seed=1"):
        one("x").merged(one("y", seed=1))
    with pytest.raises(RecipeError, match="two results are named 'x'"):
        one("x").merged(one("x"))
    alone = evaluate_equivariance(Oracle(*OBJECTS), OBJECTS[:1], name="w", pairs=2, points=30)
    with pytest.raises(RecipeError, match="different pairs"):
        one("x").merged(alone)


def test_tables(both: EquivarianceResult) -> None:
    text = both.table()
    assert text.splitlines()[0] == "| model | APE % | PCDP@.05 % | PCDP@.10 % | PCDP@.20 % |"
    assert len(text.splitlines()) == 4
    assert "[" in text
    assert both.table("html").count("<tr>") == 3
    bins = both.bin_cells("APE")
    assert len(bins[0]) == 1 + len(both.bins)
    assert "–" in bins[0][1]
    assert both.difference_cells("random")[1][0] == "oracle"
    with pytest.raises(RecipeError, match=r"PCDP@.10"):
        both.bin_cells("PCDP@.1")
    with pytest.raises(RecipeError, match="Did you mean oracle"):
        both.summary("oracel")


def test_one_object_has_no_interval() -> None:
    one = evaluate_equivariance(Oracle(OBJECTS[0]), OBJECTS[:1], points=20)
    assert math.isnan(one.summary("model")["APE"].low)
    assert "[" not in one.table()
    assert "NaN" not in one.to_json()
