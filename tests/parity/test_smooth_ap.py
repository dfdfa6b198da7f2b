"""SmoothAP equals the reference implementation (3DCorrEnhance 06a94d9) in value and gradients."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from equifeat.loss import smooth_ap
from tests.helpers import GOLDEN


@pytest.mark.parametrize("case", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [None, 1, 16])
def test_smooth_ap_equals_the_reference(case: str, chunk: int | None) -> None:
    stored = load_file(GOLDEN / "smooth_ap.safetensors")
    get = {key.split(".")[1]: v for key, v in stored.items() if key.startswith(f"{case}.")}
    d0, d1 = (get[f"descriptors{v}"].requires_grad_() for v in (0, 1))
    loss = smooth_ap(
        d0,
        d1,
        get["points3d0"],
        get["points3d1"],
        tau=0.01,
        pos_radius=5e-3,
        neg_radius=0.1,
        variant="reference",
        chunk=chunk,
    )
    torch.testing.assert_close(loss, get["loss"][0], rtol=1e-5, atol=0.0)
    for descriptors, name in ((d0, "grad0"), (d1, "grad1")):
        (grad,) = torch.autograd.grad(loss, descriptors, retain_graph=True)
        # Relative to the largest entry of the gradient: single entries cancel to nearly nothing.
        torch.testing.assert_close(
            grad, get[name], rtol=1e-5, atol=1e-5 * float(get[name].abs().max())
        )
