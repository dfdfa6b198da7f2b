"""Hostile files never end in anything but a finite mesh or a MeshError (tests/fuzz_meshes.py)."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.mesh import Mesh, load_mesh
from data_prep.primitives import Primitive
from tests.data_prep.glb import tetra
from tests.data_prep.mutate import HOSTILE, mutate
from tests.data_prep.seeds import external, make_folder, seed_files
from tests.fuzz_meshes import Watch, check, run, unfit

SEEDS = seed_files()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("fuzz"))


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.sampled_from(SEEDS), rng=st.randoms(use_true_random=True))
def test_mutations_shrink_to_a_small_case(
    folder: Path, seed: tuple[str, bytes], rng: random.Random
) -> None:
    suffix, data = seed
    path = folder / f"case{suffix}"
    path.write_bytes(mutate(suffix, data, rng))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(path) == ""


def test_every_field_of_a_header_takes_every_hostile_value(folder: Path) -> None:
    """Not by chance: each key of a small textured file, with each value of the wrong kind."""
    import json

    header = json.loads(external())
    path = folder / "field.gltf"

    def walk(node: object) -> None:
        if not isinstance(node, dict | list):
            return
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            old = node[key]
            for value in HOSTILE[::9]:
                node[key] = value
                text = json.dumps(header).encode("utf-8", errors="surrogatepass")
                path.write_bytes(text)
                assert check(path) == "", (key, value)
            node[key] = old
            walk(old)

    walk(header)


def test_children_that_may_crash_find_nothing() -> None:
    """Real processes with a memory limit and an audit hook on every open."""
    number, findings = run(minutes=0.1, seed=7, keep=None, cases=300)
    assert number >= 100
    assert findings == []


def test_the_checks_see_what_they_are_for(folder: Path, tmp_path: Path) -> None:
    watch = Watch(folder)
    secret = folder.parent / "secret.png"
    watch.active = True
    secret.read_bytes()
    (folder / "a.mtl").read_bytes()
    watch.active = False
    assert watch.seen == [f"open {secret}"]
    (part,) = load_mesh(tetra().write(tmp_path)).primitives
    assert unfit(Mesh("whole", [part])) == ""
    short = Primitive(part.vertices[:-1], part.faces, part.normals)
    assert "other length" in unfit(Mesh("short", [short])).replace("another", "other")
