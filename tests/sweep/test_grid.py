from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from equifeat.errors import RecipeError
from equifeat.sweep.grid import Sweep, read_sweep

TASKS = [{"task": "equivariance", "data": "views", "protocol": "views/quick"}]
SIMPLE: dict[str, Any] = {"recipe": "../base.yaml", "evaluate": {"select": TASKS}}


def read(tmp_path: Path, content: Any) -> Sweep:
    path = tmp_path / "ablation.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return read_sweep(path)


def test_every_combination_of_rows_and_grid(tmp_path: Path) -> None:
    content = {
        **SIMPLE,
        "set": {"trainer.max_steps": 3, "model.lr": 1e-5},
        "runs": {
            "conv": {"model.head": "conv"},
            "reference": {"recipe": ["a.yaml", "b.yaml"], "model.tau": 0.02},
        },
        "grid": {"model.lr": [1e-4, 3e-4], "data.augment": [True]},
        "seeds": [3, 5],
    }
    sweep = read(tmp_path, content)
    assert [row.name for row in sweep.rows] == [
        "conv,lr=0.0001,augment=true",
        "conv,lr=0.0003,augment=true",
        "reference,lr=0.0001,augment=true",
        "reference,lr=0.0003,augment=true",
    ]
    assert sweep.seeds == (3, 5)
    assert sweep.splits["select"][0].protocol == "views/quick"
    row = sweep.rows[3]
    assert row.recipes == (str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"))
    assert row.keys == {
        "trainer.max_steps": 3,
        "model.lr": 3e-4,  # the grid's value replaces that of `set`
        "model.tau": 0.02,
        "data.augment": True,
    }
    words = row.arguments(5, Path("out/x"))
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert pairs[:2] == [("--config", row.recipes[0]), ("--config", row.recipes[1])]
    assert ("--data.augment", "true") in pairs
    assert pairs[-3:] == [
        ("--seed_everything", "5"),
        ("--run.dir", "out/x"),
        ("--ckpt_path", "last"),
    ]


def test_a_sweep_without_rows_is_one_row_named_by_its_file(tmp_path: Path) -> None:
    sweep = read(tmp_path, SIMPLE)
    assert [(row.name, row.keys) for row in sweep.rows] == [("ablation", {})]
    assert sweep.rows[0].recipes == (str(tmp_path / "../base.yaml"),)
    assert sweep.seeds == (0,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'. Did you mean seeds"),
        ({"baseline": "ablatoin"}, "baseline 'ablatoin' is no row .*Did you mean ablation"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "a number twice"),
        ({"seeds": [True]}, "seeds must be a list of whole numbers"),
        ({"evaluate": {}}, "measures nothing"),
        ({"evaluate": {"a": "views"}}, "tasks must be a list"),
        ({"evaluate": {"a": [{"task": "equivariance"}]}}, "needs task and data"),
        ({"recipe": None}, "needs recipe"),
        ({"runs": {"a/b": {}}}, "cannot be the name of a folder"),
        ({"runs": {"a": [1]}}, "must give values by key"),
        ({"runs": ["a"]}, "runs must be a mapping"),
        ({"grid": {"model.lr": 1e-4}}, "must be a list of values"),
        ({"grid": {"data.views": ["a/x", "b/x"]}}, "two rows are named"),
        ({"set": {"run.dir": "x"}}, "sets run.dir, which the sweep sets itself"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        read(tmp_path, {**SIMPLE, **change})


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", ""])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"ablation\.yaml"):
        read(tmp_path, text)
    with pytest.raises(RecipeError, match="unreadable"):
        read_sweep(tmp_path / "none.yaml")
