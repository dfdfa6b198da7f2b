"""Typed errors. Each message is one sentence: what was wrong, the value, what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class EquifeatError(Exception):
    """Base of every error a user can cause; the command line prints it as one sentence."""


class MeshError(EquifeatError):
    """A mesh file that is missing, unreadable, empty or unsafe."""


class RenderError(EquifeatError):
    """A renderer that is absent, or a view that came out blank or wrong."""


class ViewsError(EquifeatError):
    """A folder of rendered views that is missing, incomplete or of another format."""


class ManifestError(EquifeatError):
    """A manifest of a long job that is damaged, of another job, or in use."""


class DownloadError(EquifeatError):
    """Objects that cannot be fetched, or a list of them that makes no sense."""


class PackError(EquifeatError):
    """A packed data set that is incomplete, altered or of another format."""


class CorrespondenceError(EquifeatError):
    """Views without the covisible pixels that were asked for."""


class ImageError(EquifeatError):
    """An image that cannot be read or has the wrong shape."""


class KeypointError(EquifeatError):
    """Keypoints outside the image or of the wrong shape."""


class WeightsError(EquifeatError):
    """Backbone weights that are missing, altered or of another model."""


class ModelNameError(EquifeatError):
    """A model name that timm does not know."""


class CheckpointError(EquifeatError):
    """A model folder or checkpoint that does not fit exactly."""


class ExportError(EquifeatError):
    """A model that cannot be written in a format, or an export that does not give its features."""


class FeaturesError(EquifeatError):
    """Written features that are missing, damaged, or of another run."""


class RecipeError(EquifeatError):
    """A recipe or option that is wrong."""


class EvalDataError(EquifeatError):
    """Data of an evaluation task that is missing, incomplete or not in its format."""


class SubmitError(EquifeatError):
    """A job that SLURM does not take, or no SLURM at all."""


class TrainingError(EquifeatError):
    """A run that cannot go on."""


class MissingExtraError(EquifeatError):
    """An optional package that is not installed.

    Args:
        package: Name of the missing package.
        extra: The extra of equifeat that installs it.
        purpose: What it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f'pip install "equifeat[{extra}]"'
        )


def import_extra(package: str, extra: str, purpose: str) -> Any:
    """Import an optional package.

    Args:
        package: Its name.
        extra: The extra of equifeat that installs it.
        purpose: What it is needed for.

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package.partition(".")[0], extra, purpose) from error


class LazyExtra:
    """An optional package that is imported when something of it is first used.

    Args:
        package: Its name.
        extra: The extra of equifeat that installs it.
        purpose: What it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self._wanted = (package, extra, purpose)

    def __getattr__(self, name: str) -> Any:
        # copy and inspect ask everything for names like __deepcopy__: that imports nothing.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_extra(*self._wanted), name)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean a, b?' with the nearest known names, or an empty string.

    Args:
        name: What the user wrote.
        known: The names that exist.

    Returns:
        A sentence that starts with a space, or an empty string when nothing is near.
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f" Did you mean {', '.join(near)}?" if near else ""
