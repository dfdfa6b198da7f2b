"""The wheel: what is in it, and that it works where nothing but its requirements is installed."""

from __future__ import annotations

import configparser
import json
import shutil
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from equifeat._version import __version__
from tests.clean_env import build_sdist, build_wheel, clean_env, copy_checkout, required, run
from tests.helpers import ROOT

INFO = f"equifeat-{__version__}.dist-info"

# Modules that import what only an extra brings, and what: others import them inside functions.
NEEDS_EXTRA = {"data_prep.renderers.pyrender_gl": "pyrender"}

LIGHT = """
import sys
import equifeat
from importlib.metadata import packages_distributions
third = {name.partition(".")[0] for name in sys.modules} & set(packages_distributions())
print(sorted(third - {"equifeat", "_distutils_hack"}))
"""


class Built(NamedTuple):
    """A wheel and the checkout it was built from."""

    wheel: Path
    source: Path

    def names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return {name for name in archive.namelist() if not name.endswith("/")}

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as archive:
            return message_from_bytes(archive.read(f"{INFO}/METADATA"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("release")
    source = copy_checkout(folder / "source")
    # Files that a build must leave out.
    (source / "equifeat" / "notes.txt").write_text("stray")
    return Built(build_wheel(source, folder / "wheel"), source)


@pytest.fixture(scope="module")
def programs(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a clean environment with the wheel."""
    return clean_env(tmp_path_factory.mktemp("clean") / "env", built.wheel)


@pytest.fixture(scope="module")
def probed(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What release_probe.py finds there."""
    folder = tmp_path_factory.mktemp("probe")
    shutil.copy(ROOT / "tests" / "release_probe.py", folder)
    done = run(programs / "python", "release_probe.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def expected_files() -> set[str]:
    """What the wheel must hold beside its metadata: all code, py.typed, all recipes."""
    code = [*(ROOT / "equifeat").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in code}
    names |= {"equifeat/py.typed", "data_prep/py.typed"}
    recipes = [path for path in (ROOT / "recipes").rglob("*") if path.is_file()]
    return names | {f"equifeat/{path.relative_to(ROOT).as_posix()}" for path in recipes}


def test_wheel_holds_code_recipes_and_licence_and_nothing_else(built: Built) -> None:
    metadata = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"}
    metadata |= {"licenses/LICENSE"}
    expected = expected_files() | {f"{INFO}/{name}" for name in metadata}
    assert built.names() == expected
    assert "equifeat/recipes/dinov2_base.yaml" in expected
    assert "equifeat/recipes/slurm/fit.sbatch" in expected


def test_files_that_code_reads_are_in_the_packages() -> None:
    """A new data file must be named in setup.cfg, or it is missing after pip install."""
    known = {"equifeat/py.typed", "data_prep/py.typed"}
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("equifeat", "data_prep")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert found == known


def test_every_folder_with_code_is_a_package() -> None:
    folders = {
        path.parent for name in ("equifeat", "data_prep") for path in (ROOT / name).rglob("*.py")
    }
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_metadata(built: Built) -> None:
    metadata = built.metadata()
    assert metadata["Name"] == "equifeat"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    payload = metadata.get_payload(decode=True)
    assert isinstance(payload, bytes)
    assert payload.strip() == (ROOT / "README.md").read_bytes().strip()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = set(config["options.extras_require"])
    assert {canonicalize_name(name) for name in metadata.get_all("Provides-Extra", [])} == {
        canonicalize_name(name) for name in extras
    }
    assert "dev" in extras
    # An extra that names another one must name one that exists.
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if requirement.name == "equifeat":
            assert requirement.extras <= extras


def test_sdist_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    sdist = build_sdist(built.source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.py"} <= names
    assert {"recipes/smoke.yaml", "recipes/slurm/fit.sbatch"} <= names
    assert not [
        name for name in names if name.startswith(("tests", "docs", ".")) or "notes" in name
    ]
    again = build_wheel(sdist, tmp_path / "wheel")
    with zipfile.ZipFile(built.wheel) as first, zipfile.ZipFile(again) as second:
        contents = [
            {name: archive.read(name) for name in archive.namelist() if "RECORD" not in name}
            for archive in (first, second)
        ]
    assert contents[0] == contents[1]


def test_installed_package_is_used_from_anywhere(
    programs: Path, probed: dict[str, Any], empty: Path
) -> None:
    assert Path(probed["file"]).is_relative_to(programs.parent)
    done = run(programs / "equifeat", "--version", cwd=empty)
    assert done.stdout.strip() == __version__, done.stderr
    done = run(programs / "equifeat", cwd=empty)
    assert "usage: equifeat COMMAND" in done.stdout


def test_recipes_of_the_installed_package(
    programs: Path, probed: dict[str, Any], empty: Path
) -> None:
    listed = run(programs / "equifeat", "recipes", cwd=empty)
    assert listed.returncode == 0, listed.stderr
    assert "dinov2_base.yaml" in listed.stdout
    packaged, own = probed["recipes"]
    assert "backbone: vit_base_patch14_dinov2.lvd142m" in packaged
    assert "tau: 0.05" in packaged
    assert "tau: 0.02" in own  # a file of the user's comes first


def test_every_module_imports_without_any_extra(probed: dict[str, Any]) -> None:
    assert len(probed["modules"]) > 150
    assert set(probed["failed"]) == set(NEEDS_EXTRA), probed["failed"]
    for name, package in NEEDS_EXTRA.items():
        assert f"No module named '{package}'" in probed["failed"][name]


def test_help_of_every_command_needs_no_extra(probed: dict[str, Any]) -> None:
    assert probed["no_help"] == {}


def test_missing_extra_is_one_sentence(programs: Path, empty: Path) -> None:
    words = ("procedural", "--count", "1", "--out", "meshes")
    done = run(programs / "equifeat", *words, cwd=empty)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "'trimesh'" in line
    assert 'pip install "equifeat[render]"' in line


def test_clean_environment_lacks_the_extras(programs: Path, empty: Path) -> None:
    """The two tests above would pass for nothing if the environment held everything."""
    absent = {"trimesh", "embreex", "onnx", "onnxruntime", "ray", "datasets", "pycolmap", "cv2"}
    absent |= {"poselib", "scipy", "submitit", "wandb", "av", "zarr", "mkdocs", "pytest"}
    code = f"import importlib.util as u; print([n for n in {sorted(absent)} if u.find_spec(n)])"
    done = run(programs / "python", "-c", code, cwd=empty)
    assert done.stdout.strip() == "[]", done.stderr
    assert {"torch", "timm", "peft", "numpy"} <= set(required())


def test_import_loads_no_other_package(programs: Path, empty: Path) -> None:
    done = run(programs / "python", "-c", LIGHT, cwd=empty)
    assert done.stdout.strip() == "[]", done.stderr
