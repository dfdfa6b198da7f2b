"""Protocols are objects with ids: everything a published number depends on, in one place.

A protocol never changes under its id: tests/eval/protocols.json holds the digest of each, and a
change needs a new id. What a user changes for a run gets an id of its own, with the changes in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from equifeat.errors import RecipeError, suggest

Mean = Literal["units", "rows", "weighted", "auc"]


class Metric(NamedTuple):
    """One number of a result table, and how it is averaged.

    Attributes:
        name: Heading, such as "PCK@.10 per image".
        unit: "%", "px", "deg" or "".
        higher: Whether more is better.
        mean: "units" is the mean over units of the mean over their rows, "rows" the mean over all
            rows, "weighted" that with the rows' weights; "auc" the area under the recall curve of
            the rows' errors up to ``limit``, in percent. Bootstraps draw units in each case.
        limit: Upper end of the errors of "auc".
    """

    name: str
    unit: str = "%"
    higher: bool = True
    mean: Mean = "units"
    limit: float = 0.0


@dataclass(frozen=True)
class FeatureSpec:
    """How a protocol turns an image into a feature map.

    Args:
        resolution: Patches on the longer side; None keeps the image's own size. So models of
            different patch sizes have equal grids.
        overlap: Patches start every patch_size / overlap pixels, with resampled positions.
        layers: Blocks whose tokens are taken, counted from the end like list indices; of several
            the L2-normalised features are concatenated.
        norm: Whether the ViT's final norm is applied.
        scale: Factor on the number of patches: 2 gives the model an image twice as large.
    """

    resolution: int | None = None
    overlap: int = 1
    layers: tuple[int, ...] = (-1,)
    norm: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class Protocol:
    """One evaluation protocol.

    Args:
        id: `family/name`; changes of a user follow behind a "+".
        task: Name of the task.
        about: One sentence.
        source: Where the protocol comes from: paper, repository.
        metrics: What is reported; the first one leads.
        unit: What bootstraps draw: "object", "video", "pair", …
        features: How images become features.
        options: A frozen dataclass of the task's own: threshold basis, query mode, split, …
        seed: Seed of everything drawn.
        published: By model, by metric, the published number; shown beside measured ones, marked.
        version: Raised when the code of the protocol changes its numbers.
    """

    id: str
    task: str
    about: str
    source: str
    metrics: tuple[Metric, ...]
    unit: str
    features: FeatureSpec = field(default_factory=FeatureSpec)
    options: Any = None
    seed: int = 0
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    version: int = 1

    def record(self) -> dict[str, Any]:
        """Return all that numbers depend on, as plain values.

        Returns:
            A dictionary for JSON; texts and published numbers are left out.
        """
        options = self.options or {}
        if not isinstance(options, Mapping):  # plain values are what a file of results holds
            options = dataclasses.asdict(options)
        record = {
            "id": self.id,
            "task": self.task,
            "version": self.version,
            "unit": self.unit,
            "seed": self.seed,
            "features": dataclasses.asdict(self.features),
            "options": options,
            "metrics": [metric._asdict() for metric in self.metrics],
        }
        plain: dict[str, Any] = json.loads(json.dumps(record))
        return plain

    def digest(self) -> str:
        """Return the identity of `record`.

        Returns:
            The SHA-256 of its canonical JSON, 64 hexadecimal digits.
        """
        text = json.dumps(self.record(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def changed(self, changes: Mapping[str, str]) -> Protocol:
        """Return the protocol with other options, under an id that names them.

        Args:
            changes: By name of a feature option, an option of the task or "seed", the new value as
                text: JSON, or a bare word.

        Returns:
            Another protocol, without published numbers; this one when nothing is changed.

        Raises:
            RecipeError: No such option, or a value of a wrong type.
        """
        parts: dict[str, dict[str, Any]] = {"features": {}, "options": {}, "": {}}
        names = {
            **{f.name: "features" for f in dataclasses.fields(self.features)},
            **(
                {f.name: "options" for f in dataclasses.fields(self.options)}
                if self.options
                else {}
            ),
            "seed": "",
        }
        for name, text in changes.items():
            if name not in names:
                raise RecipeError(
                    f"{self.id} has no option {name!r}, only {', '.join(sorted(names))}."
                    + suggest(name, names)
                )
            owner = getattr(self, names[name]) if names[name] else self
            kind = get_type_hints(type(owner))[name]
            value = _parse(name, text, kind)
            if value != getattr(owner, name):
                parts[names[name]][name] = value
        said = {k: v for part in parts.values() for k, v in part.items()}
        if not said:
            return self
        words = ",".join(f"{name}={_word(said[name])}" for name in sorted(said))
        out: dict[str, Any] = {
            "id": f"{self.id}+{words}",
            "about": f"{self.about}; changed: {words.replace(',', ', ')}",
            "published": {},
            **parts[""],
        }
        for part in ("features", "options"):
            if parts[part]:
                out[part] = dataclasses.replace(getattr(self, part), **parts[part])
        return dataclasses.replace(self, **out)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _parse(name: str, text: str, kind: Any) -> Any:
    """Read a value of the option's type."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if not _fits(value, kind):
        raise RecipeError(f"{name}={text} must be {_describe(kind)}.")
    if get_origin(kind) is tuple:
        return tuple(value)
    return float(value) if kind is float else value


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, list):
            return False
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if inner:  # a union
        return any(_fits(value, one) for one in inner)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if kind is None else kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, str(kind))
