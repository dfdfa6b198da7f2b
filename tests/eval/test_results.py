"""Results: numbers from rows, comparisons, the file and its schema, joining."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equifeat.errors import RecipeError
from equifeat.eval.environment import commit_of, environment
from equifeat.eval.results import ModelRuns, Results, TaskResult, chosen_items
from equifeat.eval.task import Row
from equifeat.metrics.curves import auc
from tests.eval.made_up import NAMES, Options, made_up_results, made_up_task
from tests.helpers import ROOT

jsonschema: Any = importlib.import_module("jsonschema")


@pytest.fixture(scope="module")
def results() -> Results:
    return made_up_results()


@pytest.fixture(scope="module")
def text(results: Results) -> str:
    return results.to_json()


def mean(values: list[float]) -> float:
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values)


def test_numbers_follow_from_the_rows(results: Results) -> None:
    views, pose, keypoints = results.tasks
    for seeds, model in ((3, views.models[-1]), (1, views.models[0])):
        by_seed = [
            mean([mean([r.values["APE"] for r in rows if r.unit == unit]) for unit in views.units])
            for rows in model.rows
        ]
        found = views.summary(model.name)["APE"]
        assert found.value == pytest.approx(sum(by_seed) / seeds)
        assert found.low < found.value < found.high
        assert (found.units, found.seeds) == (8, seeds)
    rows = pose.models[1].rows[0]
    errors = [r.values["pose AUC@5°"] for r in rows]
    summary = pose.summary(NAMES[1])
    assert math.inf in errors
    assert summary["pose AUC@5°"].value == pytest.approx(auc(errors, 5.0))
    assert summary["recall"].value == pytest.approx(mean([r.values["recall"] for r in rows]))
    rows = keypoints.models[0].rows[0]
    known = [r for r in rows if not math.isnan(r.values["by class"])]
    weighted = sum(r.weights["by class"] * r.values["by class"] for r in known)
    expected = weighted / sum(r.weights["by class"] for r in known)
    assert keypoints.summary("raw")["by class"].value == pytest.approx(expected)
    with pytest.raises(RecipeError, match=r"no model 'rw', only raw.*Did you mean raw"):
        views.summary("rw")


def test_gains_are_seen_and_corrected(results: Results) -> None:
    paired = results.tasks[0].paired
    assert list(paired) == list(NAMES[1:])
    for name, gain in zip(NAMES[1:], (1.0, 5.0, 8.0), strict=True):
        assert paired[name]["PCDP@.05"].value == pytest.approx(gain, abs=1.0)
        assert paired[name]["APE"].value == pytest.approx(-gain, abs=1.2)
    best = paired[NAMES[3]]["PCDP@.05"]
    assert best.p == 2 / 2**8
    assert best.p_holm == pytest.approx(6 * best.p)
    assert best.low > 5
    assert all(d.p_holm >= d.p for by in paired.values() for d in by.values())


def test_breakdowns(results: Results) -> None:
    views = results.tasks[0]
    parts = views.breakdown("view change")
    assert list(parts) == ["000-030°", "030-060°", "090-120°"]
    assert {(p.rows, p.units) for p in parts.values()} == {(8, 8)}
    for part, value in enumerate(parts):
        expected = mean(
            [r.values["PCDP@.05"] for r in views.models[0].rows[0] if r.part == str(part)]
        )
        found = parts[value].summary["raw"]["PCDP@.05"]
        assert found.value == pytest.approx(expected)
    with pytest.raises(RecipeError, match="no label 'category', only view change"):
        views.breakdown("category")
    numbered = made_up_task(values=("10 px", "9 px", "9.5 px"), models=1, units=2)
    assert numbered.label_values("view change") == ["9 px", "9.5 px", "10 px"]


def test_one_unit_one_model() -> None:
    one = made_up_task(models=1, units=1, values=("a", "b"))
    found = one.summary("raw")["PCDP@.05"]
    assert found.units == 1
    assert math.isfinite(found.value)
    assert math.isnan(found.low)
    assert one.paired == {}
    two = made_up_task(models=2, units=1)
    assert math.isnan(two.paired[NAMES[1]]["PCDP@.05"].p_holm)


def test_models_must_have_the_same_items() -> None:
    base = made_up_task(models=1)
    rows = base.models[0].rows[0]
    cases = {
        "row 2 has item 'object 0' for raw but 'elsewhere' for other, seed 0": (
            *rows[:2], rows[2]._replace(item="elsewhere"), *rows[3:],
        ),
        "row 0 has unit": (rows[0]._replace(unit="u"), *rows[1:]),
        "row 1 has labels": (rows[0], rows[1]._replace(labels={}), *rows[2:]),
        "raw has 24 rows but other, seed 0 23: 'object 7' is missing": rows[:-1],
        "other, seed 0 has 25 rows but raw 24: 'object 0' is missing": (*rows, rows[0]),
    }  # fmt: skip
    for message, others in cases.items():
        other = ModelRuns("other", ("h",), (others,))
        with pytest.raises(RecipeError, match=message):
            replace(base, models=(base.models[0], other))
    with pytest.raises(RecipeError, match="two results are named 'raw'"):
        replace(base, models=base.models * 2)
    with pytest.raises(RecipeError, match="at least one model"):
        replace(base, models=())
    with pytest.raises(RecipeError, match="2 checkpoints but 1 lists"):
        replace(base, models=(ModelRuns("raw", ("a", "b"), (rows,)),))
    with pytest.raises(RecipeError, match="in the results twice"):
        Results((base, base), {})


def test_chosen_items(results: Results) -> None:
    def task(metric: int, values: dict[str, float]) -> TaskResult:
        base = made_up_task(models=1)
        lead = base.protocol.metrics[metric]._replace(mean="units")
        protocol = replace(base.protocol, metrics=(lead,))
        rows = tuple(Row(i, i, {lead.name: v}) for i, v in values.items())
        return TaskResult(protocol, "", "", (ModelRuns("m", ("h",), (rows,)),))

    values = {"a": 1.0, "b": 4.0, "c": math.nan, "d": 2.0, "e": 3.0}
    assert chosen_items(task(0, values), "m", 2) == (["a", "d"], ["b", "e"])
    assert chosen_items(task(1, values), "m", 2) == (["b", "e"], ["a", "d"])
    assert chosen_items(task(0, {"a": 1.0}), "m", 3) == (["a"], ["a"])
    # rows of an area are errors: object 3 failed
    worst, best = chosen_items(results.tasks[1], "raw", 1)
    assert worst == ["object 3"]
    assert best != worst


def test_the_file_comes_back_and_follows_its_schema(
    results: Results, text: str, tmp_path: Path
) -> None:
    schema = json.loads((ROOT / "docs" / "results.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    for bad in ({"tasks": 3}, {"extra": 1}, {"version": 2}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate(json.loads(text) | bad)
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert again.to_json() == text
    for mine, theirs in zip(results.tasks, again.tasks, strict=True):
        assert theirs.protocol.digest() == mine.protocol.digest()
        assert theirs.pictures == {}
        assert theirs.models[0].rows[0][1].labels == mine.models[0].rows[0][1].labels
    assert Results.from_json(text).tasks[0].models == again.tasks[0].models
    assert "NaN" not in text
    assert '"inf"' in text


def test_reading_is_strict(text: str, tmp_path: Path) -> None:
    def broken(change: Any) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    def first(data: Any) -> Any:
        return data["tasks"][0]

    cases: dict[str, Any] = {
        "is needed": lambda d: d.update(version=2),
        "unknown key 'more'": lambda d: first(d).update(more=1),
        "lacks 'caption'": lambda d: first(d).pop("caption"),
        "was altered": lambda d: first(d)["protocol"].update(seed=1),
        "24 items but 23 of unit": lambda d: first(d)["rows"]["unit"].pop(),
        "23 of APE for 24 rows": lambda d: first(d)["models"][0]["runs"][0]["values"]["APE"].pop(),
        "neither a number": lambda d: first(d)["models"][0]["runs"][0]["values"].update(
            APE=["x"] * 24
        ),
        "is no text": lambda d: first(d)["rows"].update(item=[1] * 24),
        "no valid equifeat-results": lambda d: first(d)["protocol"].update(metrics=[{"a": 1}]),
        "int, but dict": lambda d: d.update(environment=3),
        "at least one model": lambda d: first(d).update(models=[]),
    }
    for message, change in cases.items():
        with pytest.raises(RecipeError, match=message):
            Results.from_json(broken(change))
    for wrong in ("", "[1]", "nonsense", "[" * 100000):
        with pytest.raises(RecipeError):
            Results.from_json(wrong)
    with pytest.raises(RecipeError, match=r"none\.json cannot be read"):
        Results.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"bad\.json: results lacks 'format'"):
        Results.load(tmp_path / "bad.json")


def test_joining_files() -> None:
    def alone(**options: Any) -> Results:
        return Results((made_up_task(models=1, **options),), {"date": "today"})

    whole = Results((made_up_task(models=2),), {})
    joined = alone().merged(alone(first=1))
    assert joined.tasks[0].paired == whole.tasks[0].paired
    assert joined.environment["merged"] == [{"date": "today"}]
    through_files = Results.from_json(alone().to_json()).merged(alone(first=1))
    assert through_files.tasks[0].paired == whole.tasks[0].paired
    cases = {
        "options.alpha=0.1 and options.alpha=0.2": alone(first=1, options=Options(0.2)),
        "different data .data hash d+ and e+.": alone(first=1, data_hash="e" * 64),
        "two results are named 'raw'": alone(),
        "no counterpart: the other results hold no protocol of its task": alone(
            first=1, name="spair/x", task="semantic"
        ),
        "no counterpart: the other results hold views/other": alone(first=1, name="views/other"),
        "different items": alone(first=1, units=7),
    }
    for message, other in cases.items():
        with pytest.raises(RecipeError, match=message):
            alone().merged(other)


def test_environment(tmp_path: Path) -> None:
    found = environment(["equifeat", "evaluate", "a b"], "cpu", 2)
    assert {"equifeat", "torch", "timm", "numpy", "python"} <= found["versions"].keys()
    assert found["command"] == "equifeat evaluate 'a b'"
    assert found["processes"] == 2
    assert found["date"].endswith("+00:00")
    json.dumps(found)
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    commit = commit_of(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path) == f"{commit}+changes"
