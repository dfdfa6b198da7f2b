"""What the frozen ViT knows is kept: the term's value, its cost, and what it does to a fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equifeat.cli import run
from equifeat.data.batch import PairBatch, collate_pairs
from equifeat.data.pairs import PairSource
from equifeat.data.views import open_views
from equifeat.errors import RecipeError
from equifeat.model.feature_map import FeatureMap
from equifeat.train import preserve, trunk_cache
from equifeat.train.loggers import read_metrics
from equifeat.train.module import EquivariantFinetune
from equifeat.train.preserve import MOST_PATCHES, Preservation, PreserveKind
from tests.train import runs
from tests.train.test_fit import recipe

KINDS: tuple[PreserveKind, ...] = ("features", "relations")


@pytest.fixture(scope="module")
def batch(views: Path) -> PairBatch:
    source = PairSource(open_views(views), 0, num_keypoints=60)
    return collate_pairs([source.draw(i) for i in range(2)])


def module(**options: Any) -> EquivariantFinetune:
    return EquivariantFinetune(runs.BACKBONE, weights="random", **options)


def shaken(**options: Any) -> EquivariantFinetune:
    """A module whose adapter and head do something."""
    made = module(**options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in made.extractor.trainable_parameters().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return made


def half_and_half(batch: PairBatch, grid: int) -> PairBatch:
    """The object fills the left quarter of every view, and all of the first one."""
    masks = torch.zeros_like(batch.masks0)
    masks[..., : masks.shape[-1] // 4] = True
    return replace(batch, masks0=torch.stack([masks[0] | True, masks[1]]), masks1=masks)


def maps(grid: int, size: int = 64, seed: int = 0) -> FeatureMap:
    generator = torch.Generator().manual_seed(seed)
    return FeatureMap(torch.randn(4, 8, grid, grid, generator=generator), (size, size))


def cosines(features: Tensor) -> Tensor:
    unit = features.double() / features.double().norm(dim=0)
    return torch.matmul(unit.mT, unit)


@pytest.mark.parametrize("kind", KINDS)
def test_the_term_is_what_it_says(batch: PairBatch, kind: PreserveKind) -> None:
    marked = half_and_half(batch, 4)
    now, raw = maps(4), maps(4, seed=1)
    wanted = []
    for i, mask in enumerate([*marked.masks0, *marked.masks1]):
        there = mask[8::16, 8::16].flatten()  # at the centres of 16-pixel patches
        assert int(there.sum()) == (16 if i == 0 else 4)
        a, b = now.features[i].flatten(1), raw.features[i].flatten(1)
        sets = [rows for rows in (there.nonzero()[:, 0], (~there).nonzero()[:, 0]) if len(rows)]
        if kind == "features":
            distance = 1 - torch.cosine_similarity(a.double(), b.double(), dim=0)
            wanted.append(torch.stack([distance[rows].mean() for rows in sets]).mean())
        else:
            square = (cosines(a) - cosines(b)).square()
            means = [square[rows][:, columns].mean() for rows in sets for columns in sets]
            wanted.append(torch.stack(means).mean())
    found = Preservation(kind, 1.0)(now, raw, marked)
    assert float(found) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-5)
    assert float(Preservation(kind, 1.0)(raw, raw, marked)) == 0.0


def test_large_maps_compare_some_patches_the_same_ones_for_a_draw(batch: PairBatch) -> None:
    marked = half_and_half(batch, 32)
    now, raw = maps(32), maps(32, seed=1)
    term = Preservation("relations", 1.0)
    value = term(now, raw, marked)
    assert torch.equal(value, term(now, raw, marked))
    assert not torch.equal(value, term(now, raw, replace(marked, draws=[7, 8])))
    assert not torch.equal(value, Preservation("relations", 1.0, seed=1)(now, raw, marked))
    # Random features: any choice gives the mean of all, 2 / channels, within its noise.
    assert float(value) == pytest.approx(2 / 8, rel=0.05)
    for share, there in ((0.5, 256), (0.1, 102), (0.9, 409), (1.0, MOST_PATCHES)):
        mask = torch.zeros(1024, dtype=torch.bool)
        mask[: int(share * 1024)] = True
        rows = preserve._choice(mask, torch.Generator().manual_seed(0))
        assert len(rows) == len(set(rows.tolist())) == MOST_PATCHES
        assert int(mask[rows].sum()) == there


def test_an_untrained_residual_model_is_the_raw_vit(batch: PairBatch) -> None:
    for kind in KINDS:
        plain, kept = module(), module(preserve=kind, preserve_weight=100.0)
        assert torch.equal(kept._step(batch, "train"), plain._step(batch, "train"))
    conv, raw = module(head="conv", preserve="features")._features(batch, "train")
    assert raw is not None
    assert bool(Preservation("features", 1.0)(conv, raw, batch) > 0.5)
    assert not raw.features.requires_grad


def test_the_loss_is_the_objective_and_the_weighted_term(batch: PairBatch) -> None:
    objective = shaken()._step(batch, "train")
    for kind in KINDS:
        alone, more = (shaken(preserve=kind, preserve_weight=w) for w in (0.0, 3.0))
        assert torch.equal(alone._step(batch, "train"), objective)
        found, raw = more._features(batch, "train")
        assert raw is not None
        term = more.preservation(found, raw, batch)
        torch.testing.assert_close(more._step(batch, "train"), objective + 3.0 * term)
        term.backward()  # type: ignore[no-untyped-call]
        parameters = more.extractor.trainable_parameters().values()
        assert sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_checkpointing(batch: PairBatch, kind: PreserveKind) -> None:
    full = shaken(preserve=kind)
    wanted = full._step(batch, "train")
    wanted.backward()  # type: ignore[no-untyped-call]
    again = shaken(preserve=kind, gradient_checkpointing=True)
    again._step(batch, "train").backward()  # type: ignore[no-untyped-call]
    for a, b in zip(full.parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6)  # type: ignore[arg-type]
    half = shaken(preserve=kind)
    half.extractor.compute_in(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        features, raw = half._features(batch, "train")
        assert raw is not None
        term = half.preservation(features, raw, batch)
    assert term.dtype == torch.float32
    features, raw = full._features(batch, "train")
    assert raw is not None
    torch.testing.assert_close(term, full.preservation(features, raw, batch), rtol=0.05, atol=0)


def test_raw_features_are_cached_beside_the_tokens(
    batch: PairBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = preserve.raw_features

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(trunk_cache, "raw_features", counted)
    seen = set(batch.keys0 + batch.keys1)
    cached = shaken(preserve="features", trunk_cache_mb=16)
    cold = cached._step(batch, "train")
    assert len(calls) == len(seen) == len(cached.cache._views)
    assert torch.equal(cached._step(batch, "train"), cold)
    assert len(calls) == len(seen)
    tokens = shaken(trunk_cache_mb=16)
    tokens._step(batch, "train")
    # 16 patches and one prefix token of 64 channels; the raw map has no prefix.
    assert tokens.cache.bytes == len(seen) * 17 * 64 * 4
    assert cached.cache.bytes == tokens.cache.bytes + len(seen) * 16 * 64 * 4
    uncached = shaken(preserve="features")._step(batch, "train")
    torch.testing.assert_close(cold, uncached)


def test_a_head_with_more_channels_or_a_finer_grid(batch: PairBatch) -> None:
    now, raw = maps(4), maps(4, seed=1)
    wide = FeatureMap(torch.cat([raw.features, raw.features], dim=1), raw.size_hw)
    with pytest.raises(RecipeError, match=r"16 channels and the ViT 8: use preserve=relations"):
        Preservation("features", 1.0)(wide, raw, batch)
    assert float(Preservation("relations", 1.0)(wide, raw, batch)) < 1e-12
    # Each feature repeated 2 x 2 times: at the patches' centres nothing has changed.
    finer = replace(now, features=now.features.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for kind in KINDS:
        term = Preservation(kind, 1.0)
        assert float(term(finer, now, batch)) == pytest.approx(0.0, abs=1e-6)
        assert torch.allclose(term(finer, raw, batch), term(now, raw, batch))


def test_a_fit_stays_nearer_to_the_raw_vit(tmp_path: Path, views: Path) -> None:
    drift = {}
    for weight in (0.0, 20.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        options = {"preserve": "features", "preserve_weight": weight}
        run(["fit", "--config", str(recipe(folder, views, **options))])
        drift[weight] = [float(row["train/preserve"]) for row in read_metrics(folder / "run")]
        assert len(drift[weight]) == 8
    assert drift[0.0][0] == drift[20.0][0] == 0.0
    assert 0.0 < drift[20.0][-1] < 0.5 * drift[0.0][-1]


def test_wrong_options_are_named() -> None:
    with pytest.raises(RecipeError, match=r"preserve must be one of .*Did you mean.*features"):
        Preservation("feature", 1.0)
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(RecipeError, match=f"preserve_weight is {weight}"):
            module(preserve="features", preserve_weight=weight)
