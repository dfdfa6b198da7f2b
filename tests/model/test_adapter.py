from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from equifeat.errors import CheckpointError, RecipeError
from equifeat.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoraAdapter
from equifeat.model.backbone import Backbone
from tests.model.tiny import KINDS, backbone, images, randomize, timm_model

LAST = 2


def features(ours: Backbone, adapter: LoraAdapter | None, image: Tensor) -> Tensor:
    state = ours.trunk(image, LAST)
    if adapter is None:
        return ours.tail(state)
    with adapter.attached(ours.blocks):
        return ours.tail(state)


def some(kind: str, alpha: float | None = None) -> tuple[Backbone, LoraAdapter, Tensor]:
    ours = backbone(kind)
    adapter = LoraAdapter(ours.blocks, LAST, rank=3, alpha=alpha, seed=7)
    return ours, adapter, images(2, 4 * ours.patch_size, 3 * ours.patch_size)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapter_changes_nothing_at_all(kind: str) -> None:
    ours, adapter, image = some(kind)
    assert torch.equal(features(ours, adapter, image), features(ours, None, image))


@pytest.mark.parametrize("kind", KINDS)
def test_trained_adapter_acts_only_while_attached(kind: str) -> None:
    ours, adapter, image = some(kind)
    before, names = features(ours, None, image), list(ours.state_dict())
    randomize(adapter)
    changed = features(ours, adapter, image)
    assert float((changed - before).detach().abs().max()) > 1e-2
    assert torch.equal(features(ours, None, image), before)
    with pytest.raises(ZeroDivisionError), adapter.attached(ours.blocks):
        _ = 1 / 0
    assert torch.equal(features(ours, None, image), before)
    assert list(ours.state_dict()) == names


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(kind: str) -> None:
    ours, adapter, image = some(kind, alpha=5.0)
    randomize(adapter)
    expected = features(ours, adapter, image)
    adapter.fold_into(ours.blocks)
    assert torch.allclose(features(ours, None, image), expected, atol=1e-5)


def projections(ours: Backbone, adapter: LoraAdapter, image: Tensor) -> dict[str, list[Tensor]]:
    """Watch q, k, v inside the attention of the first adapted block."""
    attn: Any = ours.blocks[ours.depth - LAST].attn
    seen: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    watched: list[Any] = []
    state = ours.trunk(image, LAST)

    def fused(_: Any, __: Any, out: Tensor) -> None:
        for part, value in zip("qkv", out.chunk(3, dim=-1), strict=True):
            seen[part].append(value.detach())

    for attach in (False, True):
        with adapter.attached(ours.blocks if attach else backbone_copy(ours).blocks):
            if attn.qkv is None:
                for part in "qkv":

                    def split(_: Any, __: Any, out: Tensor, part: str = part) -> None:
                        seen[part].append(out.detach())

                    watched.append(getattr(attn, f"{part}_proj").register_forward_hook(split))
            else:
                watched.append(attn.qkv.register_forward_hook(fused))
            ours.tail(state)
        for handle in watched:
            handle.remove()
        watched.clear()
    return seen


def backbone_copy(ours: Backbone) -> Backbone:
    return copy.deepcopy(ours)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "eva_bias_beside_weight"])
def test_only_q_and_v_change_and_k_exactly_not(kind: str) -> None:
    ours, adapter, image = some(kind)
    randomize(adapter)
    seen = projections(ours, adapter, image)
    assert torch.equal(seen["k"][0], seen["k"][1])
    for part in "qv":
        assert float((seen[part][0] - seen[part][1]).abs().max()) > 1e-2


def test_weights_of_k_stay_when_the_attention_reads_its_weight_itself() -> None:
    ours, adapter, _ = some("eva_bias_beside_weight")
    randomize(adapter)
    attn: Any = ours.blocks[-1].attn
    original = attn.qkv
    with adapter.attached(ours.blocks):
        new = attn.qkv.weight.detach()
    assert attn.qkv is original
    for part, (a, b) in enumerate(zip(original.weight.chunk(3), new.chunk(3), strict=True)):
        assert torch.equal(a, b) == (part == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_update_is_scaled_by_alpha_over_rank(kind: str) -> None:
    """Twice alpha is the same as twice B."""
    ours, adapter, image = some(kind, alpha=6.0)
    randomize(adapter)
    expected = features(ours, adapter, image)
    adapter.alpha = 3.0
    with torch.no_grad():
        for key in adapter.blocks:
            for update in adapter.pair(int(key)):
                update.b.mul_(2)
    assert torch.allclose(features(ours, adapter, image), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_adapter_and_no_frozen_weight(kind: str) -> None:
    ours, adapter, image = some(kind)
    randomize(adapter)
    state = ours.trunk(image.requires_grad_(), LAST)
    assert not state.tokens.requires_grad
    with adapter.attached(ours.blocks):
        torch.autograd.backward(ours.tail(state).square().sum())
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert image.grad is None
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_loads_the_saved_adapter(kind: str, tmp_path: Path) -> None:
    model = timm_model(kind)
    ours = Backbone(copy.deepcopy(model), KINDS[kind][0])
    adapter = LoraAdapter(ours.blocks, LAST, rank=3, alpha=6.0)
    randomize(adapter)
    adapter.save_peft(tmp_path, ours.blocks, ours.name)
    image = images(1, 3 * ours.patch_size, 4 * ours.patch_size)
    expected = features(ours, adapter, image).detach()

    def tokens(vit: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = vit.forward_features((image - ours.mean) / ours.std)
        return out[:, ours.num_prefix_tokens :].transpose(1, 2).reshape(expected.shape)

    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path))
    if kind != "eva_bias_beside_weight":  # this one never calls qkv: it must be merged
        assert torch.allclose(tokens(loaded.base_model.model), expected, atol=1e-5)
    merged: Any = loaded.merge_and_unload()
    assert torch.allclose(tokens(merged), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "eva_split"])
def test_saved_adapter_loads_equal(kind: str, tmp_path: Path) -> None:
    ours, adapter, image = some(kind, alpha=1.5)
    randomize(adapter)
    adapter.save_peft(tmp_path, ours.blocks, ours.name)
    other = LoraAdapter(ours.blocks, LAST, rank=3, alpha=1.5, seed=99)
    other.load_peft(tmp_path, ours.blocks)
    for a, b in zip(adapter.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(features(ours, other, image), features(ours, adapter, image))


def test_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    ours, adapter, _ = some("vit")
    randomize(adapter)

    def load(rank: int = 3, last: int = LAST) -> None:
        LoraAdapter(ours.blocks, last, rank).load_peft(tmp_path, ours.blocks)

    with pytest.raises(CheckpointError, match="does not exist"):
        load()
    adapter.save_peft(tmp_path, ours.blocks, ours.name)
    load()
    with pytest.raises(CheckpointError, match=r"4 of wrong shape .*\(6, 64\) instead of \(8, 64\)"):
        load(rank=4)
    with pytest.raises(CheckpointError, match="2 missing"):
        load(last=3)
    with pytest.raises(CheckpointError, match="2 unexpected"):
        load(last=1)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**config, "lora_alpha": 1}))
    with pytest.raises(CheckpointError, match=r"lora_alpha 1, but config\.json asks for 6"):
        load()
    (tmp_path / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load()
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    state = load_file(tmp_path / ADAPTER_WEIGHTS)
    key = next(key for key in state if "lora_B" in key)
    state[key][70, 0] = 1.0  # a row of k
    save_file(state, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match="more than q and v"):
        load()


def test_initial_numbers_are_those_of_the_reference() -> None:
    """A as nn.Linear's kaiming-uniform with a = √5 (bound 1/√D), B zero, by seed and block."""
    ours = backbone("vit")
    adapter = LoraAdapter(ours.blocks, 4, seed=1)
    downs = [update.a for key in adapter.blocks for update in adapter.pair(int(key))]
    bound = ours.dim**-0.5
    for down in downs:
        assert 0.9 * bound < float(down.detach().abs().max()) <= bound
    assert len({float(down.detach().sum()) for down in downs}) == len(downs)
    assert not any(
        parameter.any() for name, parameter in adapter.named_parameters() if ".b" in name[-2:]
    )
    # The same block starts the same whatever the number of adapted blocks.
    fewer = LoraAdapter(ours.blocks, 2, seed=1)
    assert torch.equal(fewer.pair(5)[0].a, adapter.pair(5)[0].a)


@pytest.mark.parametrize(("last", "rank"), [(0, 4), (7, 4), (2, 0)])
def test_options_out_of_range(last: int, rank: int) -> None:
    with pytest.raises(RecipeError):
        LoraAdapter(backbone("vit").blocks, last, rank)
