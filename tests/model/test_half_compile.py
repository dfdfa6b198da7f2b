"""Inference in half precision and with compiled blocks, alone, together and with every option."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import matplotlib
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from equifeat.errors import RecipeError
from equifeat.image_files import read_image
from equifeat.model.compiled import CompiledBlocks
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.head import HeadKind
from tests.model.tiny import backbone, images, randomize

HALVES = [torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"layers": (0, -1)},
    {"layers": (-2,), "norm": False, "overlap": 2},
    {"at": "image", "layers": (0, -1), "overlap": 2},
]


def tiny(kind: str = "dinov2", head: HeadKind = "conv") -> FeatureExtractor:
    extractor = build_extractor(backbone(kind), head=head, lora_blocks=2, lora_rank=2).eval()
    assert extractor.adapter is not None
    randomize(extractor.adapter)
    return extractor


@cache
def real() -> FeatureExtractor:
    """DINOv2 ViT-S/14 with LoRA and a head that are not without effect."""
    extractor = build_extractor("vit_small_patch14_dinov2.lvd142m", "packaged", head="residual")
    assert extractor.adapter is not None
    assert extractor.head.conv is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in extractor.trainable_parameters().items():
            if not name.endswith(".a"):
                value.add_(0.01 * torch.randn(value.shape, generator=generator))
    return extractor.eval()


def photograph() -> Tensor:
    """The photograph that matplotlib brings, 600 × 512."""
    return read_image(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")[None]


@pytest.fixture
def no_programs() -> Iterator[None]:
    """torch.compile from scratch, without the run-time shape checks of the suite."""
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_of_dinov2_is_near_the_full_one(dtype: torch.dtype) -> None:
    model = real()
    half = copy.deepcopy(model).half_precision(dtype)
    keypoints = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(0)) * 500
    with torch.no_grad():
        expected = model.dense(photograph(), 10)
        found = half.dense(photograph(), 10)
        points = half.at(photograph(), keypoints, 10)
    assert found.features.dtype == points.dtype == torch.float32
    cosine = F.cosine_similarity(found.features, expected.features)
    assert float(cosine.min()) > (0.999 if dtype == torch.bfloat16 else 0.99999)
    cosine = (points * expected.sample(keypoints)).sum(-1)
    assert float(cosine.min()) > (0.999 if dtype == torch.bfloat16 else 0.99999)
    assert not torch.equal(found.features, expected.features)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head", ["conv", "residual", "none"])
def test_half_precision_with_every_option(options: dict[str, Any], head: HeadKind) -> None:
    model = tiny(head=head)
    expected = model.dense(images(), **options)
    assert model.half_precision(torch.bfloat16) is model
    found = model.dense(images(), **options)
    assert found.features.dtype == torch.float32
    assert (found.features.shape, found.margin_yx) == (expected.features.shape, expected.margin_yx)
    cosine = F.cosine_similarity(found.features, expected.features).detach()
    assert 1e-8 < float((1 - cosine).abs().max()) < 0.01


def test_the_head_runs_in_half_precision_only_when_asked() -> None:
    model = tiny(head="conv")
    seen: list[torch.dtype] = []
    assert model.head.conv is not None
    model.head.conv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    model.compute_in(torch.bfloat16)
    model.dense(images())
    model.half_precision(torch.bfloat16)
    model.dense(images())
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_tiled_and_one_by_one(dtype: torch.dtype) -> None:
    model = tiny().half_precision(dtype)
    batch = images(1, 84, 112)
    tiled = model.dense_tiled(batch, tile=8, layers=(0, -1))
    whole = model.dense(batch, layers=(0, -1))
    assert torch.equal(tiled.features, whole.features)
    windows = model.dense_tiled(batch, tile=4, tile_overlap=2).features
    assert windows.dtype == torch.float32
    (many,) = model.dense_many([batch], tile=4, tile_overlap=2)
    assert torch.equal(many.maps.features, windows)


def test_wrong_types_are_named() -> None:
    model = tiny()
    with pytest.raises(RecipeError, match=r"torch\.bfloat16 or torch\.float16, not torch\.float32"):
        model.half_precision(torch.float32)
    model.half_precision(torch.bfloat16)
    model.half_precision(torch.bfloat16)
    with pytest.raises(RecipeError, match=r"in torch\.bfloat16 already: load it again"):
        model.half_precision(torch.float16)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_compiled_blocks_give_the_same_with_every_option(
    no_programs: None, options: dict[str, Any]
) -> None:
    plain = tiny()
    compiled = copy.deepcopy(plain)
    assert compiled.compile_blocks("aot_eager") is compiled
    with torch.no_grad():
        for batch in (images(2), images(1, 84, 70)):
            expected = plain.dense(batch, **options).features
            assert torch.allclose(compiled.dense(batch, **options).features, expected, atol=1e-4)
    runner = compiled.backbone.run_block
    assert isinstance(runner, CompiledBlocks)
    assert runner.failure is None


def test_compiled_blocks_serve_tiles_videos_and_inference_mode(no_programs: None) -> None:
    plain = tiny()
    compiled = copy.deepcopy(plain).compile_blocks("aot_eager")
    batch = images(1, 84, 112)
    options = {"tile": 4, "tile_overlap": 2}
    expected = plain.dense_tiled(batch, **options).features
    assert torch.allclose(compiled.dense_tiled(batch, **options).features, expected, atol=1e-4)
    (many,) = compiled.dense_many([batch], **options)
    assert torch.allclose(many.maps.features, expected, atol=1e-4)
    with torch.inference_mode():
        found = compiled.dense(batch).features
        assert torch.allclose(found, plain.dense(batch).features, atol=1e-4)
    # What is made of a compiled model, or shares its backbone, goes on working.
    with torch.no_grad():
        for one, two in ((compiled.merged(), plain.merged()), (compiled.raw(), plain.raw())):
            assert torch.allclose(one.dense(batch).features, two.dense(batch).features, atol=1e-4)


def test_a_few_sizes_need_a_few_programs(no_programs: None) -> None:
    """Sizes after the second share a program, whose sizes are left open."""
    programs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        programs.append(graph)
        return graph.forward

    model = build_extractor("test_vit.r160_in1k", "random", lora_blocks=0)
    model.compile_blocks(count)
    with torch.no_grad():
        for side in (32, 48, 64, 80, 96, 112, 128):
            model.dense(images(1, side, side))
    assert len(programs) == 2


def test_where_nothing_compiles_inference_goes_on(no_programs: None) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        raise RuntimeError("no compiler here")

    plain = tiny()
    compiled = copy.deepcopy(plain).compile_blocks(broken)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="no compiler here.*going on without"):
        found = compiled.dense(images())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # one warning is enough
        assert torch.equal(compiled.dense(images()).features, found.features)
        assert torch.equal(plain.dense(images()).features, found.features)


def test_the_modules_own_compile_is_torchs() -> None:
    """nn.Module.compile() compiles forward(); ours has another name."""
    assert FeatureExtractor.compile is torch.nn.Module.compile


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_and_compile_on_a_gpu(no_programs: None, dtype: torch.dtype) -> None:
    model = copy.deepcopy(real()).cuda()
    half = copy.deepcopy(real()).cuda().half_precision(dtype).compile_blocks()
    pixels = (photograph() * 255).to(torch.uint8)
    with torch.no_grad():
        expected = model.dense(pixels, 16)
        found = half.dense(pixels, 16)
        tiled = half.dense_tiled(pixels, 16, tile=10, tile_overlap=4, out_device="cpu")
        cosine = F.cosine_similarity(found.features, expected.features)
        assert float(cosine.min()) > (0.995 if dtype == torch.bfloat16 else 0.9999)
        same = model.dense_tiled(pixels, 16, tile=10, tile_overlap=4)
    assert found.features.is_cuda
    assert tiled.features.device.type == "cpu"
    cosine = F.cosine_similarity(tiled.features, same.features.cpu())
    assert float(cosine.min()) > (0.995 if dtype == torch.bfloat16 else 0.9999)
