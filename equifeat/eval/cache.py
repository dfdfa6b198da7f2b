"""Predictions kept on disk: one safetensors file an item, in a folder that knows what made them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from equifeat.errors import RecipeError
from equifeat.eval.task import Prediction
from equifeat.files import atomic_file

_META, _FORMAT = "predictions.json", "equifeat-predictions-1"


class PredictionCache:
    """Predictions of one model for one data set under one protocol.

    Args:
        folder: Where they are kept; None keeps them in memory only.
        key: What made them: task, protocol and its digest, hash of the model, hash of the data.

    Raises:
        RecipeError: The folder holds predictions of another configuration.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, str]) -> None:
        self.folder = folder
        self.key = {"format": _FORMAT, **key}
        self._held: dict[str, Prediction] = {}
        if folder is not None:
            self._claim(folder)

    def _claim(self, folder: Path) -> None:
        meta = folder / _META
        if meta.is_file():
            try:
                found = dict(json.loads(meta.read_text(encoding="utf-8")))
            except ValueError as error:
                raise RecipeError(
                    f"{meta} is damaged ({error}): remove {folder} or give another --cache."
                ) from error
            for name in sorted(self.key.keys() | found.keys()):
                mine, theirs = self.key.get(name), found.get(name)
                if mine != theirs:
                    raise RecipeError(
                        f"{folder} holds predictions made with {name} {theirs}, but now {name} is "
                        f"{mine}: remove the folder or give another --cache."
                    )
            return
        with atomic_file(meta) as temporary:
            temporary.write_text(json.dumps(self.key, indent=1) + "\n", encoding="utf-8")

    def __contains__(self, item: str) -> bool:
        if self.folder is None:
            return item in self._held
        return self._path(item).is_file()

    def put(self, item: str, prediction: Prediction) -> None:
        """Keep a prediction.

        Args:
            item: Id of the item.
            prediction: Tensors by name.
        """
        if self.folder is None:
            self._held[item] = prediction
            return
        tensors = {k: v.detach().cpu().contiguous() for k, v in prediction.items()}
        with atomic_file(self._path(item)) as temporary:
            save_file(tensors, temporary, metadata={"item": item})

    def get(self, item: str) -> Prediction:
        """Return a prediction that is there.

        Args:
            item: Id of the item.

        Returns:
            Tensors by name.

        Raises:
            RecipeError: The file is damaged or of another item.
        """
        if self.folder is None:
            return self._held[item]
        path = self._path(item)
        try:
            with safe_open(path, framework="pt") as file:
                of = (file.metadata() or {}).get("item")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"{path} is damaged ({reason}): remove it and run again.") from error
        if of != item:
            raise RecipeError(f"{path} is of item {of!r}, not {item!r}: remove it and run again.")
        return tensors

    def _path(self, item: str) -> Path:
        assert self.folder is not None
        digest = hashlib.sha256(item.encode()).hexdigest()[:16]
        # a thousand files a folder at most for some hundred thousand items
        return self.folder / digest[:2] / f"{file_name(item)[:60]}-{digest}.safetensors"


def file_name(text: str) -> str:
    """Return a text as a name that every file system takes.

    Args:
        text: Any text: a protocol's id, a model's name, an item.

    Returns:
        Letters, digits, dots and dashes; never empty, never a hidden file.
    """
    return re.sub(r"[^A-Za-z0-9.=,+_-]+", "-", text).strip("-.") or "unnamed"
