"""torch.hub.load from a copy of what a checkout holds, in a process of its own."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from equifeat.checkpoint import load_model
from equifeat.model.extractor import build_extractor
from tests.export.foreign_models import saved
from tests.helpers import ROOT
from tests.model.tiny import images

CODE = """
import json, sys
from pathlib import Path
import torch

repo, folder, out = sys.argv[1:]
image = torch.load(Path(out) / "image.pt", weights_only=True)
loaded = torch.hub.load(repo, "load_model", source="local", folder=folder)
built = torch.hub.load(
    repo, "build", source="local", backbone="test_vit", weights="random", head="residual",
    lora_blocks=2, seed=3,
)
with torch.no_grad():
    torch.save([m.dense(image).features for m in (loaded, built)], Path(out) / "features.pt")
# What equifeat's modules import outright, of what was needed to come this far.
files = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "equifeat"]
# torch.hub.list and help do the same, but for repositories of GitHub only.
sys.path.insert(0, repo)
import hubconf
facts = {
    "known": [n for n, v in vars(hubconf).items() if callable(v) and not n.startswith("_")],
    "help": hubconf.load_model.__doc__,
    "training": [loaded.training, built.training],
    "trainable": len(built.trainable_parameters()),
    "files": files,
}
(Path(out) / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("hub")
    repo = root / "checkout"
    repo.mkdir()
    shutil.copy(ROOT / "hubconf.py", repo)
    shutil.copytree(
        ROOT / "equifeat", repo / "equifeat", ignore=shutil.ignore_patterns("__pycache__")
    )
    folder = saved(root / "model", "test_vit", head="conv")
    torch.save(images(1, 75, 103), root / "image.pt")
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(repo), str(folder), str(root)],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return root, repo, json.loads((root / "facts.json").read_text())


def test_models_of_torch_hub_give_the_features(done: tuple[Path, Path, dict[str, Any]]) -> None:
    root, _, facts = done
    loaded, built = torch.load(root / "features.pt", weights_only=True)
    with torch.no_grad():
        expected = load_model(root / "model").dense(images(1, 75, 103)).features
        torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
        # Untrained, so exactly the raw ViT of that seed.
        raw = build_extractor("test_vit", "random", lora_blocks=0, seed=3)
        expected = raw.eval().dense(images(1, 75, 103)).features
        torch.testing.assert_close(built, expected, rtol=0, atol=1e-5)
    assert float((built - loaded).abs().max()) > 1e-2
    assert facts["training"] == [False, False]
    assert facts["trainable"] == 2 * 2 * 2 + 2


def test_the_copy_is_what_runs(done: tuple[Path, Path, dict[str, Any]]) -> None:
    _, repo, facts = done
    assert facts["files"]
    assert all(Path(file).is_relative_to(repo) for file in facts["files"])
    assert {"load_model", "build"} == set(facts["known"])
    assert "Open a model folder" in facts["help"]


def test_dependencies_are_what_is_imported(done: tuple[Path, Path, dict[str, Any]]) -> None:
    """torch.hub asks for them before anything fails half-way; none may lack, none be idle."""
    _, _, facts = done
    imported = set()
    for file in facts["files"]:
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    needed = imported - set(sys.stdlib_module_names) - {"equifeat"}
    hubconf = ast.parse((ROOT / "hubconf.py").read_text(encoding="utf-8"))
    (listed,) = (
        ast.literal_eval(node.value)
        for node in hubconf.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "dependencies"
    )
    assert set(listed) == needed
