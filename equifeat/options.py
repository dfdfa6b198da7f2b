"""Option parsers whose errors are one sentence with the nearest existing option."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from equifeat.errors import RecipeError, suggest

_UNKNOWN = (
    re.compile(r"[Uu]nrecognized arguments?: (?P<key>\S+)"),
    re.compile(r"does not accept (?:option|nested key|key) '(?P<key>[^']+)'"),
    re.compile(r"[Kk]ey [\"'](?P<key>[^\"']+)[\"'] is not expected"),
    re.compile(r"[Nn]ested key [\"'](?P<key>[^\"']+)[\"']"),
)


def _known_keys(parser: Any) -> set[str]:
    keys: set[str] = set()
    for action in parser._actions:
        keys.add(action.dest)
        choices = getattr(action, "choices", None)
        if isinstance(choices, dict):  # sub-commands
            for sub in choices.values():
                keys |= _known_keys(sub)
    return keys - {"help", "==SUPPRESS=="}


class OneSentence:
    """Mix-in for jsonargparse parsers: raise RecipeError instead of printing a usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a RecipeError with one sentence.

        Args:
            message: jsonargparse's own message, possibly over several lines.
            ex: The exception behind it.

        Raises:
            RecipeError: Always.
        """
        sentence = " ".join(message.split())
        for pattern in _UNKNOWN:
            found = pattern.search(sentence)
            if found:
                key = found["key"].lstrip("-").split("=")[0]
                known = {
                    name.replace("_", "-") if "." not in name else name
                    for name in _known_keys(getattr(ex, "subcommand_parser", None) or self)
                }
                short = {name.rsplit(".", 1)[-1]: name for name in known}
                hint = suggest(key, known) or suggest(key.rsplit(".", 1)[-1], short)
                raise RecipeError(f"unknown option or recipe key {key!r}.{hint}") from ex
        raise RecipeError(f"{sentence} (--help lists the options)") from ex


class OptionParser(OneSentence, ArgumentParser):
    """The parser of every command but fit and validate, which are Lightning's own."""


def underscored(word: str) -> str:
    """Let --eval-meshes be written for --eval_meshes, as shell users expect.

    Args:
        word: One word of a command line.

    Returns:
        The word, with underscores in its option's name.
    """
    option, equals, value = word.partition("=")
    # a word with a space in it is a value that only looks like an option
    if not option.startswith("--") or " " in option:
        return word
    return "--" + option[2:].replace("-", "_") + equals + value
