"""Run by test_release.py in a clean environment: prints what works there, as JSON.

One process does it all, because importing torch takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any


def use() -> str:
    """The README's example and a model folder; where the package is."""
    import torch

    import equifeat

    model = equifeat.build_extractor("test_vit.r160_in1k", weights="random", head="residual").eval()
    again = equifeat.load(equifeat.save_model(model, "model"))
    images = torch.rand(2, 3, 96, 128)
    keypoints = torch.tensor([[[10.5, 20.0], [100.0, 90.0]]]).expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(model.dense(images).features, again.dense(images).features)
        descriptors = again.at(images, keypoints)
    assert descriptors.shape == (2, 2, model.dim)
    assert torch.allclose(descriptors.norm(dim=-1), torch.ones(2, 2))
    return str(equifeat.__file__)


def output_of(words: list[str]) -> str:
    """What a command prints."""
    from equifeat.cli import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        run(words)
    return out.getvalue()


def recipes() -> list[str]:
    """A recipe named as the documentation names it where there is no such file; then an own one."""
    words = ["fit", "--config", "recipes/dinov2_base.yaml", "--print_config"]
    packaged = output_of(words)
    output_of(["recipes", "dinov2_base"])
    copy = Path("recipes/dinov2_base.yaml")
    copy.write_text(copy.read_text().replace("tau: 0.05", "tau: 0.02"))
    return [packaged, output_of(words)]


def modules() -> tuple[list[str], dict[str, str]]:
    """All modules, and why some cannot be imported."""
    import data_prep
    import equifeat

    names: list[str] = []
    for package in (equifeat, data_prep):
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [module.name for module in found]
    failed = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return names, failed


def helps() -> dict[str, str]:
    """Commands whose help does not come, and why."""
    from equifeat.cli import COMMANDS

    wrong = {}
    for name in COMMANDS:
        try:
            if name.split()[0] not in output_of([*name.split(), "--help"]):
                wrong[name] = "prints no help"
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return wrong


def main() -> None:
    """Print everything."""
    report: dict[str, Any] = {"file": use(), "recipes": recipes()}
    report["modules"], report["failed"] = modules()
    report["no_help"] = helps()
    sys.stdout.write("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
