"""Half precision, gradient checkpointing and torch.compile change memory and speed, not results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor

from equifeat.checkpoint import load_model, save_model
from equifeat.model.compiled import CompiledBlocks
from equifeat.model.extractor import FeatureExtractor, build_extractor
from tests.model.tiny import KINDS, backbone, images, randomize


def extractor_of(kind: str, head: str = "conv") -> FeatureExtractor:
    extractor = build_extractor(backbone(kind), head=head, lora_blocks=2, lora_rank=2)  # type: ignore[arg-type]
    assert extractor.adapter is not None
    randomize(extractor.adapter)
    return extractor


def outcome(extractor: FeatureExtractor) -> tuple[Tensor, dict[str, Tensor]]:
    """Features and the gradients of a loss of them."""
    features = extractor.dense(images(1)).features
    parameters = extractor.trainable_parameters()
    loss = (features.float() * images(1, *features.shape[-2:])[:, :1]).sum()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return features.detach(), dict(zip(parameters, grads, strict=True))


def assert_same(a: FeatureExtractor, b: FeatureExtractor, exact: bool = True) -> None:
    (x, dx), (y, dy) = outcome(a), outcome(b)
    assert dx.keys() == dy.keys()
    assert any("adapter" in name for name in dx)
    assert any("head" in name for name in dx)
    for name, (one, two) in {"features": (x, y), **{n: (dx[n], dy[n]) for n in dx}}.items():
        assert bool(one.any()), name
        if exact:
            assert torch.equal(one, two), name
        else:
            assert torch.allclose(one, two, rtol=1e-4, atol=1e-5 * float(one.abs().max())), name


def weight_bytes(extractor: FeatureExtractor) -> int:
    weights = extractor.backbone.model.parameters()
    return sum(p.numel() * p.element_size() for p in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_are_those_of_autocast_to_the_bit(kind: str) -> None:
    under_autocast = extractor_of(kind)
    own = copy.deepcopy(under_autocast)
    own.compute_in(torch.bfloat16)
    for extractor in (under_autocast, own):
        assert all(p.dtype == torch.float32 for p in extractor.trainable_parameters().values())
    halved = {p.dtype for block in own.backbone.blocks[:1] for p in block.parameters()}
    assert halved == {torch.float32, torch.bfloat16}
    assert own.backbone.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(under_autocast, own)
    # Outside of autocast, as in a callback, the model still computes as it trains.
    state = own.trunk(images(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(state.tokens, under_autocast.trunk(images(1)).tokens)
        expected = under_autocast.backbone.tail(state)
    assert torch.equal(own.backbone.tail(state), expected)


def test_half_precision_halves_the_weights_and_keeps_the_hash(tmp_path: Path) -> None:
    plain = build_extractor("vit_small_patch16_224.dino", "random", "residual", lora_blocks=2)
    half = copy.deepcopy(plain)
    half.compute_in(torch.bfloat16)
    half.compute_in(torch.bfloat16)
    assert weight_bytes(half) < 0.51 * weight_bytes(plain)
    for extractor, name in ((plain, "plain"), (half, "half")):
        save_model(extractor, tmp_path / name)
    written = [(tmp_path / name / "config.json").read_text() for name in ("plain", "half")]
    assert written[0] == written[1]
    loaded = load_model(tmp_path / "half", backbone=plain.backbone)
    assert torch.equal(loaded.dense(images(1)).features, plain.dense(images(1)).features)


def test_what_half_precision_cannot_do_is_refused() -> None:
    half = extractor_of("vit")
    half.compute_in(torch.bfloat16)
    with pytest.raises(ValueError, match="load the model folder"):
        half.merged()
    with pytest.raises(ValueError, match="already"):
        half.compute_in(torch.float16)


def test_small_updates_survive_where_lora_is_added_to_a_stored_weight() -> None:
    """Rounded together with the weight, an update of 1e-4 of it would vanish."""
    half = extractor_of("eva_bias_beside_weight")
    half.compute_in(torch.bfloat16)
    first, last = half.backbone.blocks[0], half.backbone.blocks[-1]
    assert {p.dtype for p in last.parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in first.parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_bit(kind: str, autocast: bool) -> None:
    plain = extractor_of(kind)
    if autocast:
        plain.compute_in(torch.bfloat16)
    again = copy.deepcopy(plain)
    again.recompute = True
    assert_same(plain, again)


def test_gradient_checkpointing_keeps_block_inputs_only() -> None:
    kept = {}
    for recompute in (False, True):
        extractor = extractor_of("dinov2")
        extractor.recompute = recompute
        state = extractor.trunk(images(1))
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            extractor.tail(state)
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_head_is_channels_last_and_saved_as_usual(tmp_path: Path) -> None:
    extractor = extractor_of("vit")
    conv = extractor.head.conv
    assert conv is not None
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    out = extractor.dense(images(2)).features
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def no_programs() -> Iterator[None]:
    """Compile what users run, not the type checks of tests; no programs of other tests."""
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


# torch's own, where a recomputed block is traced.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("kind", "recompute"),
    [("vit", False), ("vit", True), ("eva_bias_beside_weight", False)],
)
def test_compiled_blocks_give_the_same(no_programs: None, kind: str, recompute: bool) -> None:
    plain = extractor_of(kind)
    compiled = copy.deepcopy(plain)
    runner = CompiledBlocks("aot_eager")
    compiled.backbone.run_block = runner
    compiled.recompute = recompute
    assert_same(plain, compiled, exact=False)
    assert runner.failure is None
    # The same programs' cache serves the raw ViT, which must not get the adapter's.
    with torch.no_grad():
        raw = compiled.raw().dense(images(1)).features
        assert torch.allclose(raw, plain.raw().dense(images(1)).features, atol=1e-4)
        assert not torch.allclose(raw, compiled.dense(images(1)).features, atol=1e-2)
    assert_same(plain, compiled, exact=False)


def test_equal_blocks_share_a_program(no_programs: None) -> None:
    programs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        programs.append(graph)
        return graph.forward

    extractor = build_extractor("test_vit.r160_in1k", "random", lora_blocks=2)
    extractor.backbone.run_block = CompiledBlocks(count)
    with torch.no_grad():
        extractor.dense(images(1))
    assert extractor.backbone.depth > 2
    assert len(programs) == 2  # a frozen block, an adapted block


@pytest.mark.slow  # a C++ compiler at work
def test_real_inductor_in_bfloat16(no_programs: None) -> None:
    plain = extractor_of("dinov2")
    plain.compute_in(torch.bfloat16)
    compiled = copy.deepcopy(plain)
    runner = CompiledBlocks()
    compiled.backbone.run_block = runner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        (x, dx), (y, dy) = outcome(plain), outcome(compiled)
    assert runner.failure is None
    # A compiled block rounds to bfloat16 less often.
    for one, two in [(x, y), *((dx[name], dy[name]) for name in dx)]:
        assert float((one - two).norm()) < 0.03 * float(one.norm())


def test_without_a_compiler_it_goes_on_uncompiled(
    no_programs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "no_compiler")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain = extractor_of("vit")
    broken = copy.deepcopy(plain)
    runner = CompiledBlocks()
    broken.backbone.run_block = runner
    with pytest.warns(RuntimeWarning, match="torch.compile failed .*going on without it"):
        result = outcome(broken)
    assert runner.failure
    assert torch.equal(result[0], outcome(plain)[0])
    assert_same(plain, broken)


def test_a_backward_pass_that_cannot_be_compiled_is_found_in_time(no_programs: None) -> None:
    from torch._dynamo.backends.common import aot_autograd

    def forward_only(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return graph.forward

    def no_backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        raise RuntimeError("no room for the backward pass")

    broken = extractor_of("vit")
    plain = copy.deepcopy(broken)
    backend = aot_autograd(fw_compiler=forward_only, bw_compiler=no_backward)
    broken.backbone.run_block = CompiledBlocks(backend)
    with pytest.warns(RuntimeWarning, match="no room for the backward pass"):
        outcome(broken)
    assert_same(plain, broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_a_gpu(dtype: torch.dtype) -> None:
    under_autocast = extractor_of("dinov2").cuda()
    own = copy.deepcopy(under_autocast)
    own.compute_in(dtype)
    with torch.autocast("cuda", dtype, cache_enabled=False):
        assert_same(under_autocast, own)
