"""Commands as a user runs them: results, and one sentence with a non-zero exit for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from equifeat.cli import COMMANDS, build_parser, run
from equifeat.errors import EquifeatError
from equifeat.eval.results import Results
from tests.helpers import ROOT
from tests.synthetic import write_views

MODEL = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli_views")
    write_views(folder / "box", "box", views=4, size=96)
    write_views(folder / "sphere", "sphere", views=4, size=96)
    return folder


def fails(argv: list[str], match: str) -> None:
    with pytest.raises(EquifeatError, match=match) as caught:
        run(argv)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("fit", "validate")])
def test_every_option_is_explained(name: str) -> None:
    text = build_parser(name).format_help()
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert options
    assert "(type:" not in "".join(line.split()[0] for line in options)


def test_evaluate_prints_tables_and_writes_reports(
    tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result"
    command = ["evaluate", "equivariance", "--data", str(views), "--model", MODEL, "random"]
    options = ["--weights", "random", "--device", "cpu", "--set", "points=50", "pairs=3"]
    run([*command, *options, "--out", str(out)])
    text = capsys.readouterr().out
    assert "APE" in text
    assert "longer side of the object's box" in text
    assert "views/box-500+pairs=3,points=50" in text
    (task,) = Results.from_json((out / "results.json").read_text()).tasks
    assert [model.name for model in task.models] == [MODEL, "random"]
    assert (out / "results.md").read_text().count("|") > 10
    assert "</html>" in (out / "report.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in (out / "predictions").rglob("*.safetensors")}
    assert len(before) == 4
    run([*command, *options, "--out", str(out)])
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_suite_is_checked_before_it_runs(
    tmp_path: Path, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.yaml"
    words = ["evaluate", "all", "--suite", str(suite), "--out", str(tmp_path / "out")]
    task = {"task": "equivariance", "data": str(views), "protocol": "views/quick"}
    task["set"] = {"pairs": 2, "points": 30}  # type: ignore[assignment]
    models = {"chance": "random", "raw": MODEL}
    suite.write_text(yaml.safe_dump({"models": models, "tasks": [task, {**task, "data": "none"}]}))
    fails([*words, "--weights", "random"], "none: no such folder")
    assert not (tmp_path / "out").exists()
    for content, match in (
        ("tasks: []", "keys models and tasks"),
        ("models: [", "unreadable suite"),
        ("models: [a]\ntasks: [{task: pose, data: x}]", "WHAT by name"),
        ("tasks: {task: pose}", "tasks a list"),
        ("tasks: [{task: pose, data: x, limit: five}]", "limit of entry 0 must be a whole number"),
        ("tasks: [{task: pose, data: x, set: [a=1]}]", "set of entry 0 must be options by name"),
        ("tasks: [{task: pose}]", "entry 0"),
        ("tasks: [{task: pose, data: x, sett: {}}]", r"not sett.*Did you mean set"),
        ("tasks: [{task: pos, data: x}]\nmodels: {a: random}", r"no task 'pos'.*pose"),
    ):
        suite.write_text(content)
        fails([*words, "--weights", "random"], match)
    other = {**task, "protocol": "views/box-500", "limit": 1}
    suite.write_text(yaml.safe_dump({"models": models, "tasks": [task, other]}))
    run([*words, "--weights", "random", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "views/quick+pairs=2,points=30" in text
    assert "views/box-500+pairs=2,points=30" in text
    results = Results.from_json((tmp_path / "out" / "results.json").read_text())
    assert [[m.name for m in t.models] for t in results.tasks] == [["chance", "raw"]] * 2


def test_fixtures_are_checked_as_data_sets_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fixture"
    run(["fixtures", "views", "--out", str(out), "--painted"])
    run(["data", "equivariance", "--check", str(out)])
    text = capsys.readouterr().out
    assert "objects: 3" in text
    assert "views: 24" in text
    fails(["fixtures", "views", "--out", str(out)], "is there already")
    fails(["fixtures", "view", "--out", str(tmp_path / "new")], r"no fixture 'view'.*views")
    picture = next(out.rglob("color_*.png"))
    picture.write_bytes(picture.read_bytes() + b" ")
    fails(["data", "equivariance", "--check", str(out)], "hash differs")
    run(["evaluate", "protocols"])
    text = capsys.readouterr().out
    assert "views/dense" in text
    assert "spair/" in text


def test_features_writes_npz_and_pictures(tmp_path: Path, views: Path) -> None:
    images = [str(views / "box" / f"color_00000{i}.png") for i in (0, 1)]
    out = tmp_path / "out"
    options = ["--model", MODEL, "--weights", "random", "--device", "cpu", "--workers", "0"]
    run(["features", *images, *options, "--out", str(out), "--pca"])
    data = np.load(out / "color_000000.png.npz", allow_pickle=False)
    assert data["features"].shape == (64, 6, 6)
    assert data["size_hw"].tolist() == [96, 96]
    with Image.open(out / "color_000001.png_pca.png") as picture:
        assert picture.size == (96, 96)
    lists = {".lock", "index.json", "items.jsonl", "pca.safetensors"}
    assert {path.name for path in out.iterdir()} - lists == {
        f"color_00000{i}.png{end}" for i in (0, 1) for end in (".npz", "_pca.png")
    }


def test_match_of_an_image_with_itself_is_the_identity(tmp_path: Path, views: Path) -> None:
    image = str(views / "box" / "color_000000.png")
    out = tmp_path / "out"
    model = ["--model", MODEL, "--weights", "random", "--out", str(out)]
    run(["match", image, image, *model])
    found = np.load(out / "matches.npz", allow_pickle=False)
    assert np.array_equal(found["keypoints0"], found["keypoints1"])
    assert len(found["keypoints0"]) > 10
    points = tmp_path / "points.txt"
    points.write_text("50.0 40.0\n46,58\n")
    run(["match", image, image, *model, "--keypoints", str(points)])
    found = np.load(out / "matches.npz", allow_pickle=False)
    assert np.abs(found["keypoints1"] - found["keypoints0"]).max() <= 4.0
    assert found["mutual"].all()
    with Image.open(out / "matches.png") as picture:
        assert picture.width > 400


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["rendr"], r"'rendr'.*render"),
        (["evaluate"], r"needs a task.*equivariance"),
        (
            ["evaluate", "pose", "--data", "x", "--model", "random", "--protocol", "y"],
            "no protocol",
        ),
        (["evaluate", "pose", "--data", "x", "--model", "random", "--set", "y"], "option=value"),
        (["data", "poses", "--check", "x"], r"no task 'poses'.*pose"),
        (["features", "nowhere.png", "--model", MODEL, "--out", "OUT"], r"nowhere\.png: no such"),
        (["features", "IMAGE", "--model", "vit_smal", "--out", "OUT"], r"vit_smal.*Did you mean"),
        (["features", "IMAGE", "--model", "./no_folder", "--out", "OUT"], "not a model folder"),
        (["features", "IMAGE", "--model", MODEL, "--out", "OUT", "--format", "npy"], "mean npz"),
        (["features", "IMAGE", "--modle", MODEL, "--out", "OUT"], r"modle.*model"),
        (["match", "IMAGE", "--model", MODEL, "--out", "OUT"], "two images, not 1"),
        (["render", "nowhere.glb", "--out", "OUT"], r"nowhere\.glb"),
        (["render", "TEXT", "--out", "OUT"], r"text\.glb"),
        (["demo", "--steps", "1,x", "--out", "OUT"], r"--steps '1,x'.*1,100"),
        (["demo", "--mesh", "nowhere.glb", "--out", "OUT"], r"nowhere\.glb"),
        (["procedural", "--count", "0", "--out", "OUT"], "--count 0"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    tmp_path: Path, views: Path, argv: list[str], match: str
) -> None:
    (tmp_path / "text.glb").write_text("this is no mesh")
    words = {
        "IMAGE": str(views / "box" / "color_000000.png"),
        "OUT": str(tmp_path / "out"),
        "TEXT": str(tmp_path / "text.glb"),
    }
    fails([words.get(word, word) for word in argv], match)
    # the manifest of `equifeat render` remembers why a mesh was refused
    left = [file.name for file in (tmp_path / "out").rglob("*.*")]
    assert not [name for name in left if not name.startswith("manifest.sqlite")]


@pytest.mark.parametrize(
    ("text", "match"),
    [("200 10", r"\(200, 10\) lies outside the image of 96x96"), ("a b", "unreadable"), ("1", "N")],
)
def test_bad_keypoints_are_named(tmp_path: Path, views: Path, text: str, match: str) -> None:
    image = str(views / "box" / "color_000000.png")
    points = tmp_path / "points.txt"
    points.write_text(text)
    argv = ["match", image, image, "--model", MODEL, "--weights", "random"]
    fails([*argv, "--out", str(tmp_path / "out"), "--keypoints", str(points)], match)
    assert not (tmp_path / "out").exists()


def test_the_script_exits_with_1_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "equifeat.cli", "evaluate", "equivariance"),
            *("--data", str(tmp_path / "none"), "--model", MODEL),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("equifeat: error: ")
    assert done.stderr.count("\n") == 1
