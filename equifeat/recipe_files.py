"""The recipes that come with the package: listed, copied, found by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from equifeat.errors import RecipeError, suggest
from equifeat.files import atomic_file

FOLDER = "recipes"
_CONFIG_OPTIONS = ("--config", "-c")
_HERE = Path(__file__).resolve().parent


def recipes_dir() -> Path:
    """Return the folder of the recipes: inside the installed package, or beside it in a checkout.

    Returns:
        The folder.

    Raises:
        RecipeError: The installation has none.
    """
    for folder in (_HERE / FOLDER, _HERE.parent / FOLDER):
        if (folder / "smoke.yaml").is_file():
            return folder
    raise RecipeError(f"{_HERE} has no {FOLDER}: reinstall equifeat")


def recipe_names() -> list[str]:
    """Return the files that come with the package, relative to their folder.

    Returns:
        Such as "dinov2_base.yaml" and "slurm/fit.sbatch", sorted.
    """
    folder = recipes_dir()
    found = [*folder.rglob("*.yaml"), *folder.rglob("*.sbatch")]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def find_recipe(name: str | Path) -> Path | None:
    """Find a recipe of the package.

    Args:
        name: "dinov2_base", "dinov2_base.yaml" or "recipes/dinov2_base.yaml".

    Returns:
        The file, or None when there is no such recipe.
    """
    known = recipe_names()
    short = Path(name).as_posix().removeprefix(f"{FOLDER}/")
    for candidate in (short, f"{short}.yaml"):
        if candidate in known:
            return recipes_dir() / candidate
    return None


def with_packaged_recipes(arguments: Sequence[str]) -> list[str]:
    """Let `--config recipes/NAME.yaml` and `--config NAME` mean the recipe of the package.

    A file that exists in the working directory always comes first.

    Args:
        arguments: Arguments of ``equifeat fit`` or ``equifeat validate``.

    Returns:
        The arguments, with the packaged file in place of a --config that does not exist.
    """
    words = list(arguments)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in _CONFIG_OPTIONS:
            continue
        if not equals and index + 1 < len(words):
            words[index + 1] = _existing(words[index + 1])
        elif equals:
            words[index] = f"{option}={_existing(value)}"
    return words


def recipes_command(names: Sequence[Path] = (), out: Path = Path(FOLDER)) -> str:
    """List the recipes that come with the package, or copy some to edit them.

    Args:
        names: Recipes to copy, such as dinov2_base; without any, all are listed.
        out: Folder of the copies.

    Returns:
        The list, or what was written.

    Raises:
        RecipeError: There is no such recipe, or a copy would replace a file.
    """
    known = recipe_names()
    if not names:
        width = max(map(len, known))
        return "\n".join(f"{name:<{width}}  {_title(recipes_dir() / name)}" for name in known)
    copies: list[tuple[Path, Path]] = []
    for name in names:
        source = find_recipe(name)
        if source is None:
            raise RecipeError(
                f"there is no recipe {str(name)!r}: equifeat recipes lists them."
                f"{suggest(str(name), [Path(one).stem for one in known])}"
            )
        target = out / source.relative_to(recipes_dir())
        if target.exists():
            raise RecipeError(f"{target} exists and is not replaced: give another --out")
        copies.append((source, target))
    for source, target in copies:
        with atomic_file(target) as temporary:
            temporary.write_bytes(source.read_bytes())
    return "\n".join(f"wrote {target}" for _, target in copies)


def _existing(value: str) -> str:
    """The value itself where it is a file, else the packaged recipe it names, else itself."""
    # A config may also be the text of a recipe, which is no path.
    if "\n" in value or Path(value).exists():
        return value
    return str(find_recipe(value) or value)


def _title(path: Path) -> str:
    """The first sentence of a recipe's header."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#") and line[1:2] != "!"]
    return comments[0].rstrip(":,.") if comments else ""
