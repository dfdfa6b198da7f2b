"""The graphs that are exported give FeatureExtractor's numbers, and freeze no size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from equifeat.errors import ExportError, RecipeError
from equifeat.export.graph import dense_graph, keypoint_graph
from equifeat.export.half import to_half
from equifeat.geometry.pixels import SizeHW
from equifeat.model.backbone import Backbone
from equifeat.model.extractor import FeatureExtractor, build_extractor
from equifeat.model.head import HeadKind
from tests.model.test_families import FURTHER, NAMES, built
from tests.model.tiny import KINDS, backbone, images, randomize

ATOL = 1e-5
KINDS_AND_POSITIONS = [
    *((kind, "timm") for kind in KINDS),
    ("vit", "reference"),
    ("dinov2_reg4", "reference"),
]


def model(kind: str, position: str = "timm", head: HeadKind = "residual") -> FeatureExtractor:
    """A tiny model whose adapter and head are as if trained."""
    made = build_extractor(
        backbone(kind, position=position), head=head, lora_rank=2, lora_alpha=3.0, lora_blocks=2
    )
    assert made.adapter is not None
    randomize(made.adapter)
    if made.head.conv is not None:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            weight = made.head.conv.weight
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return made.eval()


def points(batch: int, count: int, size_hw: SizeHW) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    xy = torch.rand(batch, count, 2, generator=generator)
    return xy * torch.tensor([size_hw[1], size_hw[0]])


@torch.no_grad()
def check(extractor: FeatureExtractor, graph: nn.Module, at: nn.Module, size_hw: SizeHW) -> None:
    image, xy = images(2, *size_hw), points(2, 7, size_hw)
    expected = extractor.dense(image).features
    assert torch.allclose(graph(image), expected, rtol=0, atol=ATOL)
    assert torch.allclose(at(image, xy), extractor.at(image, xy), rtol=0, atol=ATOL)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize(("kind", "position"), KINDS_AND_POSITIONS)
def test_a_fixed_size_is_any_size(kind: str, position: str) -> None:
    extractor = model(kind, position, "conv" if position == "reference" else "residual")
    for size_hw in ((61, 50), extractor.backbone.native_hw, (3, 90)):
        graph, at = dense_graph(extractor, size_hw), keypoint_graph(extractor, size_hw)
        check(extractor, graph, at, size_hw)
    grid_hw = extractor.grid_hw((61, 50))
    assert dense_graph(extractor, (61, 50)).grid_hw == grid_hw


@pytest.mark.parametrize(("kind", "position"), KINDS_AND_POSITIONS)
def test_a_free_size_resamples_positions_inside(kind: str, position: str) -> None:
    extractor = model(kind, position)
    graph, at = dense_graph(extractor, None), keypoint_graph(extractor, None)
    p = extractor.patch_size
    own_h, own_w = (side // p for side in extractor.backbone.native_hw)
    for h, w in ((own_h, own_w), (own_h, 2), (own_h + 5, own_w + 2), (2, 3 * own_w), (1, 1)):
        check(extractor, graph, at, (h * p, w * p))


@pytest.mark.parametrize("name", NAMES)
def test_every_family(name: str) -> None:
    extractor = build_extractor(Backbone(built(name), name), lora_blocks=0)
    p = extractor.patch_size
    image = images(1, 5 * p, 3 * p)
    with torch.no_grad():
        expected = extractor.dense(image).features
        for size_hw in (None, (5 * p, 3 * p)):
            found = dense_graph(extractor, size_hw)(image)
            assert torch.allclose(found, expected, rtol=1e-5, atol=ATOL)


@pytest.mark.parametrize(
    ("kind", "position"),
    [("vit", "reference"), ("dinov3", "timm"), ("rope_mixed", "timm")],
)
def test_no_size_is_frozen_in_a_trace(kind: str, position: str) -> None:
    """timm's rotary embedding of DINOv3 would keep the traced size, without a word."""
    extractor = model(kind, position)
    p = extractor.patch_size
    batch, rows, columns, count = (Dim(name) for name in ("batch", "rows", "columns", "count"))
    program = torch.export.export(
        keypoint_graph(extractor, None),
        (images(2, 4 * p, 6 * p), points(2, 5, (4 * p, 6 * p))),
        dynamic_shapes={
            "images": {0: batch, 2: p * rows, 3: p * columns},
            "keypoints": {0: batch, 1: count},
        },
        strict=False,
    ).module()
    for number, h, w in ((3, 5, 3), (2, 9, 9), (2, 4, 6)):
        image, xy = images(number, h * p, w * p), points(number, 4, (h * p, w * p))
        with torch.no_grad():
            assert torch.allclose(program(image, xy), extractor.at(image, xy), rtol=0, atol=ATOL)


def test_a_model_is_not_changed_by_its_graph() -> None:
    extractor = model("vit")
    image = images()
    with torch.no_grad():
        before = extractor.dense(image).features
        to_half(dense_graph(extractor, (64, 48)))
        assert torch.equal(extractor.dense(image).features, before)
    assert extractor.adapter is not None


def test_points_outside_take_the_borders_value() -> None:
    at = keypoint_graph(model("vit"), (64, 48))
    image = images(1)
    with torch.no_grad():
        far = at(image, torch.tensor([[[-500.0, 20.0], [20.0, 999.0]]]))
        near = at(image, torch.tensor([[[0.0, 20.0], [20.0, 63.9]]]))
    assert torch.allclose(far, near, atol=ATOL)


def test_the_references_fault_of_sampling_is_kept() -> None:
    extractor = model("vit")
    image, xy = images(1), points(1, 9, (40, 40))
    with torch.no_grad():
        exact = extractor.at(image, xy)
        extractor.sampling = "reference"
        found = keypoint_graph(extractor, (64, 48))(image, xy)
        assert torch.allclose(found, extractor.at(image, xy), rtol=0, atol=ATOL)
    assert not torch.allclose(found, exact, atol=1e-3)


def test_a_free_size_refuses_broken_patches() -> None:
    graph = dense_graph(model("vit"), None)
    with pytest.raises(RuntimeError, match="shape"):
        graph(images(1, 64, 50))


def test_what_cannot_be_a_graph_is_refused() -> None:
    with pytest.raises(ExportError, match=r"height and width of 1 pixel or more, not \(0, 64\)"):
        dense_graph(model("vit"), (0, 64))
    narrow = model("vit")
    narrow.compute_in(torch.bfloat16)
    with pytest.raises(ExportError, match=r"the weights are in torch\.bfloat16: load the model"):
        dense_graph(narrow, (64, 48))
    with pytest.raises(RecipeError, match="position"):
        model("dinov3", "reference")


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near(kind: str) -> None:
    """Products in float16; norms, the tokens between blocks and all that is given in float32."""
    extractor = model(kind)
    at = keypoint_graph(extractor, (64, 48))
    to_half(at.dense)
    assert at.dense.head.conv is not None
    assert at.dense.head.conv.weight.dtype == torch.float16
    kept = [at.dense.norm, *(block.norm1 for block in at.dense.blocks)]
    assert {weight.dtype for norm in kept for weight in norm.parameters()} <= {torch.float32}
    image, xy = images(2), points(2, 7, (64, 48))
    with torch.no_grad():
        features, found = at.both(image, xy)
        expected, wanted = extractor.dense(image).features, extractor.at(image, xy)
    assert features.dtype == found.dtype == torch.float32
    off = float((features - expected).abs().max() / expected.abs().max())
    assert 1e-6 < off < 1e-2
    assert float((found - wanted).abs().max()) < 5e-3


def test_half_precision_needs_an_attention_and_an_mlp() -> None:
    name = FURTHER["no LoRA: attention and MLP at once"]
    graph = dense_graph(build_extractor(Backbone(built(name), name), lora_blocks=0), (64, 64))
    with pytest.raises(ExportError, match=r"ParallelScalingBlock has no 'attn'.*in float32"):
        to_half(graph)
