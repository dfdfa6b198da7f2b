"""Models on a hub: pushed to and opened from a local server that plays the hub."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from matplotlib.cbook import get_sample_data
from torch import Tensor

import equifeat
from equifeat.checkpoint import load_model, save_model
from equifeat.errors import CheckpointError, EquifeatError, ExportError, RecipeError, WeightsError
from equifeat.eval.models import _fetched, extractor_hash, open_word, parse_models, with_controls
from equifeat.export.hub import push, write_hub_folder
from equifeat.hub.fetch import fetch_model
from equifeat.hub.names import HubName, hub_name, is_hub_word
from equifeat.hub.pretrained import from_pretrained
from equifeat.model.extractor import FeatureExtractor
from tests.data_prep.hub_uploads import UploadHandler
from tests.model.tiny import images
from tests.model_hub_server import TOKEN, ModelHub, read_files, use_hub
from tests.test_checkpoint import trained

# huggingface_hub's own LFS upload, with its HTTP library of today
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/views"
RECIPE = {"seed": 0, "steps": 3, "data": "/home/ann/views", "lr": 1e-4}
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "head.safetensors",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(trained(), tmp_path / "model", recipe=RECIPE)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub that huggingface_hub takes for the real one; nobody is logged in."""
    with ModelHub() as server:
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        _fetched.cache_clear()
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def pushed(hub: ModelHub, folder: Path) -> ModelHub:
    """The same with the model on it."""
    push(folder, REPO, token=TOKEN)
    hub.asked.clear()
    hub.posts.clear()
    return hub


def features(model: FeatureExtractor) -> Tensor:
    with torch.inference_mode():
        return model.dense(images()).features


def fetched_names(hub: ModelHub) -> set[str]:
    """Names of the files that were asked for."""
    paths = [path for path in hub.asked if not path.startswith("/api/")]
    return {path.rsplit("/", 1)[-1].rsplit("--", 1)[-1] for path in paths}


def test_what_is_pushed_is_opened_with_equal_features(hub: ModelHub, folder: Path) -> None:
    said = push(folder, REPO, token=TOKEN, message="first")
    assert said == (
        f"pushed to {hub.url}/{REPO}/commit/{hub.branches[REPO, 'main']}; open it with "
        'equifeat.from_pretrained("me/views")'
    )
    assert set(hub.head(REPO)) == FILES | {".gitattributes"}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    config = json.loads(hub.head(REPO)["config.json"])
    assert config["recipe"] == {**RECIPE, "data": "views"}  # no paths of the author's machine
    expected = features(load_model(folder))
    for word in (REPO, f"hf://{REPO}", f"{REPO}@main"):
        model = FeatureExtractor.from_pretrained(word)
        assert torch.equal(features(model), expected)
        assert not model.training
    assert model.recipe == config["recipe"]
    assert fetched_names(hub) == FILES - {"README.md"}
    assert equifeat.from_pretrained is from_pretrained
    assert torch.equal(features(equifeat.from_pretrained(folder)), expected)


def test_a_model_in_memory_is_pushed_with_its_recipe(pushed: ModelHub, tmp_path: Path) -> None:
    model = FeatureExtractor.from_pretrained(REPO)
    said = model.push_to_hub("me/again", private=True, token=TOKEN, card={"summary": "Mine."})
    assert 'from_pretrained("me/again")' in said
    asked = pushed.repos["me/again"]
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert json.loads(pushed.head("me/again")["config.json"])["recipe"]["steps"] == 3
    assert b"Mine." in pushed.head("me/again")["README.md"]
    again = FeatureExtractor.from_pretrained("me/again", token=TOKEN)
    assert torch.equal(features(again), features(model))
    saved = again.save_pretrained(tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["recipe"]["steps"] == 3
    assert torch.equal(features(load_model(saved)), features(model))


def test_branches_commits_and_pull_requests(pushed: ModelHub, tmp_path: Path) -> None:
    first = pushed.branches[REPO, "main"]
    other = save_model(trained(seed=7), tmp_path / "other")
    assert 'from_pretrained("me/views@v2")' in push(other, REPO, revision="v2", token=TOKEN)
    assert b'from_pretrained("me/views", revision="v2")' in pushed.head(REPO, "v2")["README.md"]
    assert pushed.branches[REPO, "main"] == first
    expected = features(load_model(other))
    assert torch.equal(features(from_pretrained(REPO, revision="v2")), expected)
    assert torch.equal(features(from_pretrained(f"hf://{REPO}@v2")), expected)
    assert not torch.equal(features(from_pretrained(REPO, revision=first)), expected)
    said = push(other, REPO, create_pr=True, token=TOKEN)
    assert f"{pushed.url}/{REPO}/discussions/1" in said
    assert pushed.branches[REPO, "main"] == first
    with pytest.raises(ExportError, match=r"pull request.*main branch"):
        push(other, REPO, revision="v2", create_pr=True, token=TOKEN)


def test_a_newer_model_replaces_files_it_does_not_have(pushed: ModelHub, tmp_path: Path) -> None:
    pushed.put(REPO, {**pushed.head(REPO), "LICENSE": b"mine"})
    push(save_model(trained("none"), tmp_path / "bare"), REPO, token=TOKEN)
    assert set(pushed.head(REPO)) == FILES - {"head.safetensors"} | {".gitattributes", "LICENSE"}
    assert from_pretrained(REPO).head.kind == "none"


def test_strangers_files_stay_where_they_are(pushed: ModelHub, tmp_path: Path) -> None:
    evil = {"pytorch_model.bin": b"\x80\x04.", "modeling.py": b"boom()", "../../up.txt": b"out"}
    pushed.put(REPO, {**pushed.head(REPO), **evil, "data/config.json": b"{}"})
    from_pretrained(REPO)
    assert fetched_names(pushed) == FILES - {"README.md"}
    there = {path.name for path in tmp_path.rglob("*")}
    assert not there & {"pytorch_model.bin", "modeling.py", "up.txt"}


def test_a_private_model_needs_the_right_token(hub: ModelHub, folder: Path) -> None:
    push(folder, REPO, private=True, token=TOKEN)
    for token in (None, "hf_wrong"):
        with pytest.raises(CheckpointError, match=r"repository.*private \(HTTP 401\).*HF_"):
            from_pretrained(REPO, token=token)
    assert features(from_pretrained(REPO, token=TOKEN)).shape[1] == 64
    hub.repos[REPO] = {"gated": True}
    with pytest.raises(CheckpointError, match=r"gated \(HTTP 403\): ask for access"):
        from_pretrained(REPO, cache_dir=folder.parent / "other")


def test_what_is_not_there_is_named(pushed: ModelHub) -> None:
    with pytest.raises(
        CheckpointError, match=r"no model repository hf://me/nothing.*nor is there a"
    ):
        from_pretrained("me/nothing")
    with pytest.raises(CheckpointError, match=r"no model repository hf://me/nothing.*HTTP 404"):
        from_pretrained("me/nothing", token=TOKEN)
    with pytest.raises(CheckpointError, match=r"hf://me/views@v9 has no such revision"):
        from_pretrained(REPO, revision="v9")
    pushed.put("me/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    with pytest.raises(CheckpointError, match=r"hf://me/bert.*not of an equifeat model"):
        from_pretrained("me/bert")
    pushed.put("me/text", {"README.md": b"x"})
    with pytest.raises(CheckpointError, match=r"has no config\.json: it is not an equifeat model"):
        from_pretrained("me/text")
    pushed.put("me/deep", {"config.json": b"[" * 100_000})
    with pytest.raises(CheckpointError, match=r"hf://me/deep cannot be used"):
        from_pretrained("me/deep")
    for garbled in (
        {},
        {"backbone": 3},
        {"backbone": {"weights": {"source": "file"}}, "lora": None},
    ):
        content = {"format": "equifeat-model", "version": 1, "head": None, "lora": None, **garbled}
        pushed.put("me/odd", {"config.json": json.dumps(content).encode()})
        with pytest.raises(CheckpointError, match=r"hf://me/odd"):
            from_pretrained("me/odd")
    without = {k: v for k, v in pushed.head(REPO).items() if k != "head.safetensors"}
    pushed.put("me/part", without)
    with pytest.raises(CheckpointError, match=r"has no head\.safetensors: .*incomplete"):
        from_pretrained("me/part")
    config = json.loads(without["config.json"])
    pushed.put("me/new", {"config.json": json.dumps({**config, "version": 99}).encode()})
    with pytest.raises(CheckpointError, match=r"hf://me/new.*version 99.*pip install -U equifeat"):
        from_pretrained("me/new")
    assert "/me/new/resolve/main/config.json" in pushed.asked


def test_all_files_are_of_one_commit(pushed: ModelHub, tmp_path: Path) -> None:
    write_hub_folder(save_model(trained(seed=7), tmp_path / "other"), tmp_path / "newer")
    newer = read_files(tmp_path / "newer")
    listed = pushed.list_files

    def push_meanwhile(request: UploadHandler, repo: str, revision: str) -> None:
        listed(request, repo, revision)
        pushed.list_files = listed  # type: ignore[method-assign]
        pushed.put(REPO, newer)

    pushed.list_files = push_meanwhile  # type: ignore[method-assign]
    found = features(from_pretrained(REPO))
    assert torch.equal(found, features(load_model(tmp_path / "newer")))


def test_sizes_are_bounded_before_anything_is_fetched(pushed: ModelHub) -> None:
    pushed.put("me/huge", {"config.json": b" " * (2**20 + 1)})
    with pytest.raises(CheckpointError, match=r"config\.json has 1,048,577 bytes, more than"):
        from_pretrained("me/huge")
    assert not fetched_names(pushed)


def test_damaged_downloads_are_fetched_again_or_refused(pushed: ModelHub) -> None:
    head = pushed.head(REPO)["head.safetensors"]
    pushed.lies["head.safetensors"] = bytes([head[0] ^ 1]) + head[1:]
    with pytest.raises(CheckpointError, match=r"head\.safetensors is damaged.*force_download"):
        from_pretrained(REPO)
    pushed.lies.clear()
    from_pretrained(REPO)  # what the cache holds is seen to be damaged
    pushed.cut.add("adapter_model.safetensors")
    pushed.put(REPO, {**pushed.head(REPO)}, "fresh")
    with pytest.raises(CheckpointError, match=r"broke off"):
        from_pretrained(REPO, force_download=True)
    pushed.cut.clear()
    from_pretrained(REPO, force_download=True)


def test_without_network_the_cache_serves(
    pushed: ModelHub,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = features(from_pretrained(REPO))
    pushed.asked.clear()
    assert torch.equal(features(from_pretrained(REPO, local_files_only=True)), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(features(from_pretrained(REPO)), expected)
    with pytest.raises(CheckpointError, match="offline, nothing can be downloaded anew"):
        from_pretrained(REPO, force_download=True)
    with pytest.raises(CheckpointError, match=r"not in the cache .*HF_HUB_OFFLINE"):
        from_pretrained(REPO, cache_dir=tmp_path / "empty")
    with pytest.raises(ExportError, match="offline"):
        push(folder, REPO, token=TOKEN)
    assert not pushed.asked
    assert not pushed.posts
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pushed.status = 503
    with caplog.at_level(logging.WARNING, "equifeat.hub"):
        assert torch.equal(features(from_pretrained(REPO)), expected)
    assert "gives no answer: using commit" in caplog.text
    with pytest.raises(CheckpointError, match=r"HTTP 503\): try again later"):
        from_pretrained(REPO, cache_dir=tmp_path / "empty")


def test_a_hub_that_is_down(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(
        CheckpointError, match=r"127\.0\.0\.1:9 cannot be reached for hf://me/views"
    ):
        from_pretrained(REPO)
    with pytest.raises(ExportError, match=r"cannot be reached.*run the same again"):
        push(folder, REPO, token=TOKEN)
    huggingface_hub.close_session()


def test_an_upload_that_broke_off_is_repeated(hub: ModelHub, folder: Path) -> None:
    hub.breaks = 1
    with pytest.raises(ExportError, match="run the same again"):
        push(folder, REPO, token=TOKEN)
    hub.refuse = 1
    assert set(hub.head(REPO)) == {".gitattributes"}
    with pytest.raises(ExportError, match=r"HTTP 500.*run the same again"):
        push(folder, REPO, token=TOKEN)
    assert set(hub.head(REPO)) == {".gitattributes"}
    sent = hub.puts
    push(folder, REPO, token=TOKEN)
    assert set(hub.head(REPO)) == FILES | {".gitattributes"}
    assert hub.puts == sent == 2  # what had arrived was not sent again
    with pytest.raises(ExportError, match=r"HTTP 401.*hf auth login"):
        push(folder, REPO, token="hf_wrong")


def test_nothing_is_uploaded_of_a_model_that_does_not_open(hub: ModelHub, folder: Path) -> None:
    (folder / "notes.txt").write_text("private")
    push(folder, REPO, token=TOKEN)
    assert "notes.txt" not in hub.head(REPO)
    (folder / "head.safetensors").write_bytes(b"broken")
    hub.posts.clear()
    with pytest.raises(CheckpointError, match="head"):
        push(folder, REPO, token=TOKEN)
    with pytest.raises(CheckpointError, match="neither a folder nor USER/NAME"):
        push(folder, "just-a-name", token=TOKEN)
    assert not hub.posts


@pytest.mark.parametrize(
    "files", [{"config.json": b'{"model_type": "bert"}'}, {"pytorch_model.bin": b"x"}]
)
def test_another_model_is_not_overwritten(
    hub: ModelHub, folder: Path, files: dict[str, bytes]
) -> None:
    hub.put(REPO, files)
    with pytest.raises(ExportError, match=r"hf://me/views holds .*choose another name"):
        push(folder, REPO, token=TOKEN)
    assert hub.head(REPO) == files


def test_a_path_in_a_strangers_config_is_not_opened(
    pushed: ModelHub, folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = trained().backbone.model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "vit.safetensors")
    config = json.loads(pushed.head(REPO)["config.json"])
    config["backbone"]["weights"] = {"source": "file", "path": str(tmp_path / "vit.safetensors")}
    pushed.put(REPO, {**pushed.head(REPO), "config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError, match=r"from a file of its author: give that file"):
        from_pretrained(REPO)
    model = from_pretrained(REPO, weights=str(tmp_path / "vit.safetensors"))
    assert torch.equal(features(model), features(load_model(folder)))


def test_a_backbone_that_cannot_be_had_is_named(pushed: ModelHub) -> None:
    with pytest.raises(WeightsError, match=r"hf://me/views was fetched, but .*not its backbone"):
        from_pretrained(REPO, weights="packaged")


@pytest.mark.parametrize(
    ("word", "repo", "revision"),
    [
        ("me/x", "me/x", None),
        ("hf://me/x", "me/x", None),
        ("hf://me/x@v1.0", "me/x", "v1.0"),
        ("me/x@refs/pr/1", "me/x", "refs/pr/1"),
    ],
)
def test_names(word: str, repo: str, revision: str | None) -> None:
    assert hub_name(word) == HubName(repo, revision)
    assert is_hub_word(word) == word.startswith("hf://")


@pytest.mark.parametrize(
    ("word", "revision"),
    [
        ("me", None),
        ("hf://me", None),
        ("../x", None),
        ("me/..", None),
        ("a/b/c", None),
        ("me/x@", None),
        ("me/x@../../up", None),
        ("me/x@v1", "v2"),
        ("/abs/path", None),
    ],
)
def test_wrong_names_are_refused_before_anything_is_asked(word: str, revision: str | None) -> None:
    with pytest.raises(CheckpointError):
        hub_name(word, revision)
    with pytest.raises(CheckpointError):
        from_pretrained(word, revision=revision)


def test_a_folder_wins_and_has_no_revision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me").mkdir()
    folder.rename(tmp_path / "me" / "views")
    monkeypatch.chdir(tmp_path)
    assert from_pretrained(REPO).dim == 64
    with pytest.raises(CheckpointError, match="a folder has no revision"):
        from_pretrained(REPO, revision="v1")


def test_model_words_name_models_of_a_hub(pushed: ModelHub, folder: Path) -> None:
    specs = with_controls(parse_models([f"ours=hf://{REPO}", f"local={folder}"]))
    names = ["test_vit.r160_in1k raw", "ours untrained", "ours", "local untrained", "local"]
    assert [spec.name for spec in specs] == names
    found = {spec.name: open_word(spec.words[0]).hash for spec in specs}
    assert found["ours"] == found["local"] == extractor_hash(load_model(folder))
    assert found["ours untrained"] == found["local untrained"]
    # one commit for all rows, even if somebody pushes meanwhile
    pushed.put(REPO, {})
    assert open_word(f"hf://{REPO}").hash == found["ours"]
    with pytest.raises(CheckpointError, match="no model repository hf://me/nothing"):
        open_word("hf://me/nothing")


def test_the_snippet_of_the_card_runs_on_a_photograph(
    pushed: ModelHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = pushed.head(REPO)["README.md"].decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert 'model = equifeat.from_pretrained("me/views")' in snippet
    photo = get_sample_data("grace_hopper.jpg", asfileobj=False)  # a photograph with matplotlib
    shutil.copyfile(str(photo), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(snippet, "card", "exec"), found)
    assert fetched_names(pushed) == FILES - {"README.md"}
    with torch.inference_mode():
        expected = load_model(folder).at(found["images"], found["keypoints"])
    assert torch.equal(found["descriptors"], expected)
    assert f"(1, {found['maps'].features.shape[1]}, h, w)" in snippet


def test_fetching_needs_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EquifeatError, match=r'pip install "equifeat\[hub\]"'):
        fetch_model(HubName(REPO))


def rewritten(folder: Path, out: Path, **options: Any) -> str:
    write_hub_folder(folder, out, **options)
    return (out / "README.md").read_text(encoding="utf-8")


def test_only_a_new_or_older_model_folder_is_written_to(folder: Path, tmp_path: Path) -> None:
    said = write_hub_folder(folder, tmp_path / "out")
    assert "adapter_config.json" in said
    before = read_files(tmp_path / "out")
    write_hub_folder(folder, tmp_path / "out")
    assert read_files(tmp_path / "out") == before
    with pytest.raises(ExportError, match="the model folder itself"):
        write_hub_folder(folder, folder)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("x")
    with pytest.raises(ExportError, match=r"holds 'me\.jpg'"):
        write_hub_folder(folder, tmp_path / "photos")
    with pytest.raises(RecipeError, match="cannot be read"):
        write_hub_folder(folder, tmp_path / "new", results=tmp_path / "none.json")
    assert not (tmp_path / "new").exists()
