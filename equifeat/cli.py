"""The command table, one line a command."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equifeat._version import __version__
from equifeat.errors import EquifeatError, suggest


class Command(NamedTuple):
    """One command: its function, what it does, which options take several values or two.

    Arguments named in ``optional`` may be left out, those of ``several`` otherwise not. ``words``
    are arguments of one word. ``task`` is the function's task, where commands share a function.
    """

    target: str
    help: str
    several: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    task: str = ""


# What every task of the harness takes.
_EVALUATE = "equifeat.evaluate:evaluate_command"
_SCORED = {"several": ("--model",), "optional": ("--set",)}

COMMANDS = {
    "demo": Command("equifeat.demo:demo", "train on one object and report, end to end"),
    "procedural": Command("equifeat.commands:procedural", "write example meshes"),
    "render": Command(
        "data_prep.render:render_command",
        "meshes to posed views",
        pairs=("--elevation",),
        optional=("meshes",),
    ),
    "objaverse": Command("data_prep.objaverse:objaverse_command", "download Objaverse meshes"),
    "check-views": Command(
        "data_prep.check:check_views_command", "find faults in posed views", ("folders",)
    ),
    "pack": Command("data_prep.pack:pack_command", "views to Parquet shards", ("views",)),
    "category-pairs": Command(
        "data_prep.category_pairs:category_pairs_command",
        "views of different objects of one category, in pairs",
        ("views",),
        ("--view_change",),
    ),
    "photographs": Command(
        "data_prep.photographs:photographs_command",
        "photographs seen from other sides, with homographies",
        optional=("photographs",),
    ),
    "recipes": Command(
        "equifeat.recipe_files:recipes_command", "list or copy the recipes", optional=("names",)
    ),
    "fit": Command("equifeat.train.cli:main", "finetune from a recipe (LightningCLI)"),
    "sweep": Command(
        "equifeat.sweep.command:sweep_command", "a grid of recipes into one table", words=("sweep",)
    ),
    "submit": Command("equifeat.submit:submit_command", "a recipe to SLURM", ("recipe",)),
    "validate": Command("equifeat.train.cli:main", "loss on held-out pairs (LightningCLI)"),
    "evaluate equivariance": Command(
        _EVALUATE, "APE and PCDP on posed views", task="equivariance", **_SCORED
    ),
    "evaluate pose": Command(
        _EVALUATE, "6D pose by matching: OnePose, BOP", task="pose", **_SCORED
    ),
    "evaluate tracking": Command(
        _EVALUATE, "point tracking: TAP-Vid, BADJA", task="tracking", **_SCORED
    ),
    "evaluate semantic": Command(
        _EVALUATE, "keypoints across objects: PF-PASCAL, SPair", task="semantic", **_SCORED
    ),
    "evaluate geometric": Command(
        _EVALUATE, "two views: NAVI, ScanNet, HPatches, pose AUC", task="geometric", **_SCORED
    ),
    "evaluate probes": Command(
        _EVALUATE, "linear probes, the raw ViT's ranking", task="probes", **_SCORED
    ),
    "evaluate all": Command(
        "equifeat.evaluate:suite_command", "every task of a suite file", optional=("--model",)
    ),
    "evaluate protocols": Command("equifeat.evaluate:protocols_command", "list the protocols"),
    "data": Command("equifeat.evaluate:data_command", "is a task's data complete", words=("task",)),
    "fixtures": Command(
        "equifeat.evaluate:fixtures_command",
        "small data sets with known truth",
        optional=("--meshes",),
        words=("family",),
    ),
    "export": Command(
        "equifeat.export.command:export_command",
        "a model as timm, PEFT, transformers, ONNX, torch.export, hub",
        words=("folder",),
    ),
    "convert": Command(
        "equifeat.convert:convert_command", "a checkpoint of 3DCorrEnhance", words=("checkpoint",)
    ),
    "features": Command(
        "equifeat.features.command:features_command",
        "features of images, folders and videos",
        ("sources",),
        optional=("--layers",),
    ),
    "radiance-field": Command(
        "equifeat.downstream.radiance_field:radiance_field_command",
        "features of a scene for LERF, Feature 3DGS, gsplat",
        words=("scene",),
    ),
    "match": Command("equifeat.commands:match", "matches of two images", ("images",)),
}

_HELP = {
    "names": "recipes to copy, such as dinov2_base; without any, all are listed",
    "meshes": "mesh files, folders or globs",
    "model": "model folders, timm names, oracle or random; NAME=WHAT[,WHAT] for several seeds",
    "sources": "images, videos, folders, globs, .txt lists",
    "photographs": "names of known photographs, pictures or folders; without any, all known ones",
    "layers": "blocks whose tokens are taken, as list indices; -1 is the last",
    "set": "options of the protocol to change, each option=value",
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    first = f"equifeat {__version__}: usage: equifeat COMMAND [OPTIONS]"
    last = "equifeat COMMAND --help lists the options of a command"
    return "\n".join([first, "", *lines, "", last])


def _tasks(word: str) -> dict[str, str]:
    """Help by task of a command in two words; empty for any other."""
    start = f"{word} "
    return {n.removeprefix(start): c.help for n, c in COMMANDS.items() if n.startswith(start)}


def _split(argv: Sequence[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS and len(argv) >= words:
            return name, list(argv[words:])
    tasks = _tasks(argv[0])
    if tasks:
        raise EquifeatError(f"equifeat {argv[0]} needs a task, one of: {', '.join(tasks)}")
    raise EquifeatError(f"there is no command {argv[0]!r}.{suggest(argv[0], COMMANDS)}")


def build_parser(name: str) -> Any:
    """Return the option parser of a command (not of fit and validate, which LightningCLI makes).

    Args:
        name: Key of COMMANDS.

    Returns:
        A jsonargparse parser made from the function's signature and docstring.
    """
    from equifeat.options import OptionParser

    command = COMMANDS[name]
    function = _load(command.target)
    parser = OptionParser(prog=f"equifeat {name}", description=command.help)
    for several in command.several:
        # jsonargparse would want [a,b]; a shell user writes a b.
        kind = str if several.startswith("--") else Path
        required = {"required": True} if several.startswith("--") else {}
        said = _HELP.get(several.lstrip("-"), command.help)
        parser.add_argument(several, nargs="+", type=kind, help=said, **required)
    for optional in command.optional:
        word = optional.lstrip("-")
        each: type = {"set": str, "model": str, "layers": int}.get(word, Path)
        # written twice, an option takes both lists
        more: dict[str, Any] = {"action": "extend"} if optional.startswith("--") else {}
        said = _HELP.get(word, command.help)
        parser.add_argument(optional, nargs="*", type=each, default=[], help=said, **more)
    for word in command.words:
        parser.add_argument(word, type=str, help=command.help)
    defaults = inspect.signature(function).parameters
    for pair in command.pairs:
        default = list(defaults[pair.lstrip("-")].default)
        parser.add_argument(pair, nargs=2, type=float, default=default, help="lowest and highest")
    taken = (*command.several, *command.pairs, *command.optional, *command.words)
    skip: set[str | int] = {name.lstrip("-") for name in taken}
    skip |= {"changes", "task"} if command.task else set()
    for parameter in defaults.values():
        if parameter.default is False:
            # jsonargparse would want --name true
            parser.add_argument(f"--{parameter.name}", action="store_true", help="switch on")
            skip.add(parameter.name)
    parser.add_function_arguments(function, skip=skip)
    return parser


def _load(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def run(argv: Sequence[str]) -> None:
    """Run one command.

    Args:
        argv: Arguments behind ``equifeat``.

    Raises:
        EquifeatError: Bad input.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return
    tasks = _tasks(argv[0])
    if tasks and list(argv[1:]) in (["-h"], ["--help"]):
        print("\n".join(f"{argv[0]} {task}  {help}" for task, help in tasks.items()))
        return
    if argv[0] == "--version":
        print(__version__)
        return
    name, rest = _split(argv)
    if name in ("fit", "validate"):
        _load(COMMANDS[name].target)([name, *rest])
        return
    from equifeat.options import underscored

    values = build_parser(name).parse_args([underscored(word) for word in rest]).as_dict()
    if COMMANDS[name].task:
        values |= {"task": COMMANDS[name].task, "changes": values.pop("set")}
    text = _load(COMMANDS[name].target)(**values)
    if text is not None:
        print(text)


def main() -> None:
    """Entry point of the ``equifeat`` script: errors are one sentence and a non-zero exit."""
    try:
        run(sys.argv[1:])
        sys.stdout.flush()
    except EquifeatError as error:
        print(f"equifeat: error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # the reader, such as head, has seen enough; Python would complain at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("equifeat: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
