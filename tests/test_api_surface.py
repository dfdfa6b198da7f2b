"""The public names, signatures, commands and options, guarded by tests/api_surface.json.

    python -m tests.test_api_surface

writes the file anew. Read the difference before you commit it: a line that goes or changes breaks
somebody's code (docs/releasing.md).
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "api_surface.json"
UPDATE = "python -m tests.test_api_surface"

# Modules whose own public names users may rely on; of a package, all its modules.
PUBLIC = (
    "equifeat.checkpoint",
    "equifeat.downstream",
    "equifeat.errors",
    "equifeat.eval.equivariance",
    "equifeat.eval.locate",
    "equifeat.eval.matching",
    "equifeat.geometry.camera",
    "equifeat.geometry.pixels",
    "equifeat.loss",
    "equifeat.metrics",
    "equifeat.model.extractor",
    "equifeat.model.feature_map",
)
# Of these only what exports and loads: the rest is how it is done.
PARTLY_PUBLIC = {"equifeat.export": "export_", "equifeat.hub": "from_pretrained"}
# Of this package only what it gives itself is public, not its modules.
FACADE = "equifeat.loss"
# Options of fit that are ours; those of the trainer are Lightning's.
OURS = ("model.", "data.", "run.", "watch.", "dry_run", "seed_everything")


class Raw:
    """An annotation that prints as it is written in the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(function: Any) -> str:
    """The signature, with annotations as they are written."""
    found = inspect.signature(function)
    parameters = [
        one.replace(annotation=Raw(one.annotation)) if isinstance(one.annotation, str) else one
        for one in found.parameters.values()
    ]
    returned = found.return_annotation
    returned = Raw(returned) if isinstance(returned, str) else returned
    return str(found.replace(parameters=parameters, return_annotation=returned))


def members(cls: type, name: str) -> Iterator[tuple[str, str]]:
    """The public methods, properties and attributes that a class of ours has itself or inherits."""
    seen: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("equifeat"):
            seen.update(dict.fromkeys(inspect.get_annotations(base)))
            seen.update(vars(base))
    for key, value in seen.items():
        if key.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"{name}.{key}", f"property{signature(value.fget).removeprefix('(self)')}"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{name}.{key}", f"{type(value).__name__} {signature(value.__func__)}"
        elif inspect.isfunction(value):
            yield f"{name}.{key}", signature(value)
        else:
            yield f"{name}.{key}", "attribute"


def entries(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """What one public name offers."""
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        error = issubclass(value, Exception)
        own_init = "__init__" in vars(value) or not error
        yield name, f"class({bases}){signature(value) if own_init else ''}"
        if not error:
            yield from members(value, name)
    elif inspect.isfunction(value):
        yield name, signature(value)
    else:
        yield name, "value"


def modules(name: str) -> Iterator[Any]:
    """A module, and those of a package."""
    module = importlib.import_module(name)
    yield module
    for found in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{name}."):
        yield importlib.import_module(found.name)


def names() -> Iterator[tuple[str, str]]:
    """Every public name of the package and of its public modules."""
    equifeat = importlib.import_module("equifeat")
    for name in equifeat.__all__:
        yield from entries(f"equifeat.{name}", getattr(equifeat, name))
    for prefix, start in [*((one, "") for one in PUBLIC), *PARTLY_PUBLIC.items()]:
        for module in modules(prefix):
            for name, value in vars(module).items():
                own = getattr(value, "__module__", None) == module.__name__
                if module.__name__.startswith(FACADE):  # how it is done inside may change
                    own = module.__name__ == FACADE and name in module.__all__
                kind = inspect.isclass(value) or inspect.isfunction(value)
                hidden = name.startswith("_") or name.endswith("_command")  # commands are below
                if own and kind and not hidden and name.startswith(start):
                    yield from entries(f"{module.__name__}.{name}", value)


def fit_parser(word: str) -> Any:
    """The parser of fit or validate, which Lightning makes."""
    from equifeat.data.datamodule import PairDataModule
    from equifeat.train.cli import RecipeCLI, RecipeParser, quiet
    from equifeat.train.module import EquivariantFinetune

    found: list[Any] = []

    class Stop(Exception):  # noqa: N818
        """Nothing is to be parsed."""

    class Reader(RecipeCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.append(self._parser(word))
            raise Stop

    with quiet(), ExitStack() as stack, pytest.raises(Stop):
        Reader(
            stack,
            model_class=EquivariantFinetune,
            datamodule_class=PairDataModule,
            args=[word],
            parser_class=RecipeParser,
            seed_everything_default=0,
        )
    return found[0]


def options(name: str, parser: Any, ours: tuple[str, ...] = ("",)) -> Iterator[tuple[str, str]]:
    """The options of a command with their defaults."""
    for action in parser._actions:
        if action.dest in ("help", "config", "print_config") or not action.dest.startswith(ours):
            continue
        if type(action).__name__ in ("_ActionConfigLoad", "_ActionHelpClassPath"):
            continue
        positional = not action.option_strings
        word = action.dest if positional else f"--{action.dest}"
        yield f"equifeat {name} {word}", "required" if action.required else f"= {action.default}"


def commands() -> Iterator[tuple[str, str]]:
    """Every command with its options."""
    from equifeat.cli import COMMANDS, build_parser

    for name in COMMANDS:
        yield f"equifeat {name}", "command"
        if name in ("fit", "validate"):
            yield from options(name, fit_parser(name), OURS)
        else:
            yield from options(name, build_parser(name))


def surface() -> dict[str, str]:
    """Everything public, sorted."""
    return dict(sorted([*names(), *commands()]))


def text() -> str:
    """The content of api_surface.json, a name a line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third parties' own, on import
        return json.dumps(surface(), indent=1, ensure_ascii=False) + "\n"


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    """The surface, found in a process without the suite's import hook."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_api_surface", "--print"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_surface_is_what_the_file_says(now: dict[str, str]) -> None:
    then = json.loads(FILE.read_text(encoding="utf-8"))
    lines = [f"gone: {name}  {then[name]}" for name in then if name not in now]
    lines += [f"new: {name}  {now[name]}" for name in now if name not in then]
    lines += [
        f"changed: {name}  {then[name]}  ->  {now[name]}"
        for name in now
        if name in then and now[name] != then[name]
    ]
    assert not lines, "\n".join([*lines, f"if this is meant: {UPDATE}, and the changelog"])


def test_surface_holds_what_users_call(now: dict[str, str]) -> None:
    """A guard that lost half of the names would pass the test above for ever."""
    assert now["equifeat.load"].startswith("(folder: str | Path, device: ")
    assert "equifeat.FeatureExtractor.dense" in now
    assert now["equifeat.FeatureExtractor.dim"] == "property -> int"
    assert "equifeat.model.feature_map.FeatureMap.sample" in now
    assert now["equifeat.errors.MissingExtraError"].startswith("class(EquifeatError)(package: str")
    assert now["equifeat fit --model.lr"].startswith("= ")
    assert now["equifeat match images"] == "required"
    assert now["equifeat features --out"] == "required"
    assert not [line for line in now.values() if " at 0x" in line]
    assert not [name for name in now if name.startswith("equifeat fit --trainer")]


def test_file_is_sorted_a_name_a_line() -> None:
    content = FILE.read_text(encoding="utf-8")
    parsed = json.loads(content)
    assert list(parsed) == sorted(parsed)
    assert len(content.splitlines()) == len(parsed) + 2


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(text())
    else:
        FILE.write_text(text(), encoding="utf-8")
