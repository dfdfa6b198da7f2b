"""The convert command: what it accepts, what it writes, and how it names every mistake."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import equifeat
from equifeat.checkpoint import load_model, save_model
from equifeat.cli import run
from equifeat.convert import convert_command
from equifeat.errors import CheckpointError, EquifeatError, ModelNameError, WeightsError
from equifeat.files import sha256_of
from equifeat.model.backbone import resolve_name
from equifeat.reference_checkpoint import (
    ALIASES,
    backbone_name,
    import_reference,
    reference_position,
)
from equifeat.reference_file import read_reference
from tests.helpers import GOLDEN
from tests.model.test_weights import needs_packaged
from tests.model.tiny import backbone, images
from tests.reference_layout import FROZEN, FROZEN_BACKBONE, write_checkpoint

REFERENCE = GOLDEN / "reference_dinov2_small.ckpt"
CASES = ("land", "port", "square")
VIT, WIDTH = "test_vit.r160_in1k", 64


def convert(folder: Path, sampling: str = "exact", **changes: Any) -> str:
    """Convert a checkpoint in the reference's layout for a small ViT with patches of 16."""
    write_checkpoint(folder / "x.ckpt", WIDTH, 4, **changes)
    return convert_command(folder / "x.ckpt", folder / "out", VIT, str(FROZEN_BACKBONE), sampling)  # type: ignore[arg-type]


@needs_packaged
def test_the_command_gives_the_features_of_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mef"
    run(["convert", str(REFERENCE), "--backbone", "dinov2-small", "--out", str(out)])
    said = capsys.readouterr().out
    assert "LoRA of rank 4 on q and v of the last 4 of 12 blocks" in said
    assert "1,352,064 parameters" in said
    assert f'equifeat.load("{out}").dense(images, resolution=80)' in said
    model = equifeat.load(out)
    golden = load_file(GOLDEN / "reference_features.safetensors")
    for case in CASES:
        image, keypoints = golden[f"{case}.image"], golden[f"{case}.keypoints"]
        with torch.no_grad():
            # made with a target side of 160, so 20 patches
            maps = model.dense(image, 20)
            descriptors = maps.sample(keypoints)
            if case == "port":
                assert torch.equal(model.at(image, keypoints, 20), descriptors)
            dense = maps.at_image().normalized().features
        torch.testing.assert_close(descriptors, golden[f"{case}.descriptors"], rtol=0, atol=1e-4)
        every8 = dense[:, :, ::8, ::8].permute(0, 2, 3, 1)
        torch.testing.assert_close(every8, golden[f"{case}.dense_stride8"], rtol=0, atol=1e-4)


@needs_packaged
def test_the_folder_tells_where_it_is_from(tmp_path: Path) -> None:
    said = convert_command(REFERENCE, tmp_path / "mef", sampling="reference")
    # patches of 14 pixels have no fault to repeat, so older readers can read the folder
    assert "--sampling reference changes nothing for this backbone" in said
    config = json.loads((tmp_path / "mef" / "config.json").read_text())
    assert config["version"] == 1
    assert "sampling" not in config
    assert config["backbone"]["position"] == "reference"
    assert config["backbone"]["weights"] == {"source": "packaged"}
    assert config["recipe"] == {
        "converted_from": {
            "code": "3DCorrEnhance",
            "file": "reference_dinov2_small.ckpt",
            "sha256": sha256_of(REFERENCE),
            "epoch": 0,
            "global_step": 0,
        },
        "resolution": 80,
    }
    card = (tmp_path / "mef" / "README.md").read_text()
    assert sha256_of(REFERENCE) in card
    assert "80 patches" in card


def test_exact_sampling_is_the_default_and_stays_version_1(tmp_path: Path) -> None:
    said = convert(tmp_path)
    assert "after 40,000 steps" in said
    assert "at 16/14 of the right place: for its published numbers give --sampling reference" in (
        said
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["version"], "sampling" in config) == (1, False)
    assert load_model(tmp_path / "out").sampling == "exact"


def test_reference_sampling_is_kept_by_the_folder(tmp_path: Path) -> None:
    assert "points are sampled at 16/14 of the right place" in convert(tmp_path, "reference")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["version"], config["sampling"]) == (2, "reference")
    assert "16/14" in (tmp_path / "out" / "README.md").read_text()
    model = load_model(tmp_path / "out")
    again = load_model(save_model(model, tmp_path / "again"), backbone=model.backbone)
    assert again.sampling == model.merged().sampling == "reference"
    assert model.raw().sampling == "exact"


def test_a_folder_of_version_2_must_say_how_it_samples(tmp_path: Path) -> None:
    convert(tmp_path, "reference")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "sampling": "nearest"}))
    with pytest.raises(CheckpointError, match="sampling 'nearest'"):
        load_model(tmp_path / "out")
    path.write_text(json.dumps({key: config[key] for key in config if key != "sampling"}))
    with pytest.raises(CheckpointError, match="lacks or garbles 'sampling'"):
        load_model(tmp_path / "out")
    path.write_text(json.dumps({**config, "version": 3}))
    with pytest.raises(
        CheckpointError, match=r"has format version 3, this equifeat .* reads up to"
    ):
        load_model(tmp_path / "out")


def test_frozen_model_of_version_2_gives_the_features_it_had() -> None:
    frozen = load_file(FROZEN / "expected.safetensors")
    assert json.loads((FROZEN / "config.json").read_text())["version"] == 2
    model = load_model(FROZEN, weights=str(FROZEN_BACKBONE))
    image, keypoints = frozen["image"], frozen["keypoints"]
    with torch.no_grad():
        maps = model.dense(image, 10)
        descriptors, dense = maps.sample(keypoints), maps.at_image().normalized()
        torch.testing.assert_close(model.at(image, keypoints, 10), descriptors)
        model.sampling = "exact"
        exact = model.dense(image, 10)
    # the reference's own numbers, from an implementation independent of ours
    torch.testing.assert_close(descriptors, frozen["descriptors"], rtol=0, atol=1e-5)
    every8 = dense.features[:, :, ::8, ::8]
    torch.testing.assert_close(every8, frozen["dense"], rtol=0, atol=1e-5)
    assert (maps.grid_hw, exact.grid_hw) == ((7, 10), (8, 10))
    assert float((exact.sample(keypoints) - frozen["descriptors"]).abs().max()) > 0.05


def test_aliases_are_models_of_timm_with_the_reference_resampling() -> None:
    for alias, (name, _) in ALIASES.items():
        assert resolve_name(name) == name == backbone_name(alias)
        wanted = "reference" if re.fullmatch("dinov2-(small|base|large|giant)", alias) else "timm"
        assert reference_position(name) == wanted, alias
    assert backbone_name("vit_tiny_patch16_224").startswith("vit_tiny_patch16_224.")
    with pytest.raises(ModelNameError, match="Did you mean dinov2-small"):
        backbone_name("dinov2-smal")
    with pytest.raises(ModelNameError, match="vit_small_patch14_dinov2"):
        backbone_name("vit_small_patch14_dinov")


def test_tensors_go_where_they_belong(tmp_path: Path) -> None:
    content = write_checkpoint(tmp_path / "x.ckpt", WIDTH, 2, rank=2)
    model = import_reference(tmp_path / "x.ckpt", backbone("dinov2", position="reference"))
    assert model.adapter is not None
    assert (model.tail_blocks, model.adapter.rank, model.adapter.scale) == (2, 2, 1.0)
    order = [(1, 0), (1, 1), (2, 0), (2, 1)]  # q, v of the first adapted block, then the next
    for index, (block, part) in enumerate(order):
        update = model.adapter.pair(block)[part]
        assert torch.equal(update.a, content[f"w_a_{index:03d}"])
        assert torch.equal(update.b, content[f"w_b_{index:03d}"])
    assert model.head.conv is not None
    assert torch.equal(model.head.conv.weight, content["state_dict"]["refine_conv"]["weight"])
    with pytest.raises(CheckpointError, match="needs position='reference', not 'timm'"):
        import_reference(tmp_path / "x.ckpt", backbone("dinov2"))
    with pytest.raises(CheckpointError, match="needs position='timm', not 'reference'"):
        import_reference(tmp_path / "x.ckpt", backbone("dinov2_reg4", position="reference"))
    with pytest.raises(EquifeatError, match="sampling must be 'exact' or 'reference'"):
        import_reference(tmp_path / "x.ckpt", backbone("vit"), sampling="fast")


def conv(**changes: Tensor) -> dict[str, Any]:
    """A state_dict with another convolution."""
    plain = {"weight": torch.zeros(64, 64, 3, 3), "bias": torch.zeros(64)}
    return {"state_dict": {"refine_conv": {**plain, **changes}}}


BAD_VALUES = torch.zeros(64, 4)
BAD_VALUES[5, 2] = float("nan")

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no w_a": (
        {f"w_{part}_{i:03d}": None for i in range(8) for part in "ab"},
        "lacks 'w_a_000' .it has nothing",
    ),
    "missing in the middle": ({"w_a_001": None}, "lacks 'w_a_001'"),
    "missing at the end": ({"w_b_007": None}, r"lacks 'w_b_007' \(it has 8 w_a but 7 w_b\)"),
    "one extra": ({"w_a_008": torch.zeros(4, 64)}, "lacks 'w_b_008'"),
    "q without v": (
        {"w_a_007": None, "w_b_007": None},
        "lacks 'w_a_007': q and v of a block make pairs",
    ),
    "strange name": ({"w_a_8": torch.zeros(4, 64)}, "holds 'w_a_8', which the reference does not"),
    "too many blocks": (
        {f"w_a_{i:03d}": torch.zeros(4, 64) for i in range(8, 14)}
        | {f"w_b_{i:03d}": torch.zeros(64, 4) for i in range(8, 14)},
        "adapts 7 blocks, but 'test_vit.r160_in1k' has 6",
    ),
    "another rank": (
        {"w_a_002": torch.zeros(3, 64)},
        r"rank 4 and width 64 by 'w_a_000'\): 1 of wrong shape \(w_a_002: \(3, 64\) instead of",
    ),
    "another rank of b": ({"w_b_002": torch.zeros(64, 8)}, r"w_b_002: \(64, 8\) instead of"),
    "swapped": (
        {f"w_a_{i:03d}": torch.zeros(64, 4) for i in range(8)}
        | {f"w_b_{i:03d}": torch.zeros(4, 64) for i in range(8)},
        "w_a and w_b are swapped",
    ),
    "absurd shape": (
        {"w_a_000": torch.zeros(1).expand(2, 10**9)},
        "no ViT is so wide",
    ),
    "flat a": ({"w_a_000": torch.zeros(256)}, r"'w_a_000' of shape \(256,\) instead of"),
    "no tensor": ({"w_b_002": "text"}, "holds a str as 'w_b_002' instead of a tensor"),
    "integers": ({"w_b_002": torch.zeros(64, 4, dtype=torch.int64)}, "as torch.int64, not as"),
    "not a number": ({"w_b_003": BAD_VALUES}, "NaN or infinite numbers in 'w_b_003'"),
    "infinite": (conv(bias=torch.full((64,), float("inf"))), "NaN or infinite .*'refine_conv.bias"),
    "conv without bias": (
        {"state_dict": {"refine_conv": {"weight": torch.zeros(64, 64, 3, 3)}}},
        r"1 missing \(refine_conv.bias\)",
    ),
    "small conv": (
        conv(weight=torch.zeros(8, 8, 3, 3)),
        r"refine_conv\.weight: \(8, 8, 3, 3\) instead of \(64, 64, 3, 3\)",
    ),
    "conv 1x1": (conv(weight=torch.zeros(64, 64, 1, 1)), r"\(64, 64, 1, 1\) instead of"),
    "more in the state": (
        {"state_dict": {"refine_conv": {}, "head": torch.zeros(1)}},
        "holds 'head' in its state_dict, which is unknown",
    ),
    "other Lightning": (
        {"state_dict": {"model.fc.weight": torch.zeros(1), "model.fc.bias": torch.zeros(1)}},
        "not a reference checkpoint: its state_dict has no 'refine_conv' but 'model.fc.weight'",
    ),
    "optimizer only": (
        {"state_dict": None},
        "not a reference checkpoint: it holds the state of an optimizer and no weights",
    ),
    "flat": (
        {"state_dict": {"refine_conv.weight": torch.zeros(1)}},
        "flat names like 'refine_conv.weight'",
    ),
    "DataParallel": (
        {"state_dict": {"module.refine_conv": {"weight": torch.zeros(1)}}},
        "'module.' of DataParallel",
    ),
    "plain weights": (
        dict.fromkeys(("state_dict", "optimizer_states")),
        "not a reference checkpoint: it has no state_dict but 'epoch'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_contents_are_named_and_nothing_is_written(tmp_path: Path, mistake: str) -> None:
    changes, reason = MISTAKES[mistake]
    with pytest.raises(CheckpointError, match=reason) as caught:
        convert(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "x.ckpt") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_wrong_order_is_named(tmp_path: Path) -> None:
    content = write_checkpoint(tmp_path / "x.ckpt", WIDTH, 4)
    first, second = content.pop("w_a_001"), content.pop("w_a_002")
    torch.save({**content, "w_a_002": second, "w_a_001": first}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="in this order: the number says which of q and v"):
        convert_command(tmp_path / "x.ckpt", tmp_path / "out", VIT, str(FROZEN_BACKBONE))


def test_another_width_names_the_backbones_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    # before any weights are looked for: there are none of these here
    write_checkpoint(path, 768, 1, rank=1, state_dict={"refine_conv": wide_conv(768)})
    with pytest.raises(CheckpointError, match="it fits dinov2-base, dinov2-reg-base, mae-base, cl"):
        convert_command(path, tmp_path / "out", "dinov2-small", "absent.safetensors")
    with pytest.raises(
        CheckpointError, match=r"width 768, but vit_giant_patch14_dinov2 has .* 1536"
    ):
        convert_command(path, tmp_path / "out", "vit_giant_patch14_dinov2", "absent.safetensors")
    with pytest.raises(CheckpointError, match=r"test_vit.r160_in1k has width 64: it fits dinov2-b"):
        convert_command(path, tmp_path / "out", VIT, str(FROZEN_BACKBONE))
    write_checkpoint(path, 80, 1, rank=1, state_dict={"refine_conv": wide_conv(80)})
    with pytest.raises(CheckpointError, match="give the timm name of one that wide"):
        convert_command(path, tmp_path / "out")


def wide_conv(dim: int) -> dict[str, Tensor]:
    """A convolution of zeros."""
    return {"weight": torch.zeros(dim, dim, 3, 3), "bias": torch.zeros(dim)}


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def _code(path: Path) -> None:
    write_checkpoint(path, WIDTH, 4, extra=Code())


def _legacy_code(path: Path) -> None:
    torch.save({"extra": Code()}, path, _use_new_zipfile_serialization=False)


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"extra": Code()}))


def _cut(path: Path) -> None:
    write_checkpoint(path, WIDTH, 4)
    path.write_bytes(path.read_bytes()[:3000])


def _cut_legacy(path: Path) -> None:
    torch.save(write_checkpoint(path, WIDTH, 4), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(70 * 2**20))


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: None, "does not exist: give a .ckpt file"),
    "folder": (lambda path: path.mkdir(), "is a folder: give the .ckpt file in it"),
    "empty": (lambda path: path.touch(), "the file is empty"),
    "text": (lambda path: path.write_text("hello\n" * 9), "not a checkpoint that torch.save wrote"),
    "photo": (lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"), "not a checkpoint that t"),
    "other archive": (_zip, "not a checkpoint that torch.save wrote"),
    "cut": (_cut, "cut short or damaged"),
    "cut, old format": (_cut_legacy, "cut short or damaged"),
    "code": (_code, "without running its code: it asks for 'posix.system'"),
    "code, old format": (_legacy_code, "without running its code: it asks for 'posix.system'"),
    "any pickle": (_pickle, "cannot be read"),
    "path in it": (
        lambda path: write_checkpoint(path, WIDTH, 4, extra=Path("x")),
        r"it asks for 'pathlib.\w+'",
    ),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor: not a reference"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_other_kinds_are_named_and_never_run(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, reason = FILES[kind]
    make(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=reason) as caught:
        convert_command(tmp_path / "x.ckpt", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equifeat.reference_file._MAX_BYTES", 64 * 2**20)
    _bomb(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size < 2**20
    with pytest.raises(CheckpointError, match="more than any reference checkpoint"):
        convert_command(tmp_path / "x.ckpt", tmp_path / "out")


def test_damaged_bytes_are_a_named_error_or_harmless(tmp_path: Path) -> None:
    path, generator = tmp_path / "x.ckpt", random.Random(0)
    content = write_checkpoint(path, 8, 2, rank=2)
    new = path.read_bytes()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    old, named = path.read_bytes(), 0
    for _ in range(400):
        data = bytearray(generator.choice((new, old)))
        if generator.random() < 0.3:
            data = data[: generator.randrange(len(data))]
        else:
            for _ in range(generator.choice((1, 3, 20))):
                data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(CheckpointError):  # and nothing else
            read_reference(path)
            continue
        named += 1
    assert named > 200  # the others have other numbers, which nobody can see


def test_an_old_style_file_is_read(tmp_path: Path) -> None:
    content = write_checkpoint(tmp_path / "x.ckpt", WIDTH, 4)
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("x", "old"):
        out = tmp_path / name
        convert_command(tmp_path / f"{name}.ckpt", out, VIT, str(FROZEN_BACKBONE))
    models = [load_model(tmp_path / name) for name in ("x", "old")]
    first, second = (model.dense(images()).features for model in models)
    assert torch.equal(first, second)


def test_weights_are_refused_or_not_found_in_one_sentence(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.ckpt", WIDTH, 4)
    with pytest.raises(WeightsError, match="random makes no sense"):
        convert_command(tmp_path / "x.ckpt", tmp_path / "out", VIT, "random")
    with pytest.raises(WeightsError, match="does not exist"):
        convert_command(tmp_path / "x.ckpt", tmp_path / "out", VIT, "absent.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.png").touch()
    with pytest.raises(CheckpointError, match="will not be overwritten"):
        convert_command(tmp_path / "x.ckpt", tmp_path / "out", VIT, str(FROZEN_BACKBONE))
