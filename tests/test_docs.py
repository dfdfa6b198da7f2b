"""What the documentation says is run: doctests, Python blocks, commands and their options."""

from __future__ import annotations

import doctest
import importlib
import io
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from equifeat.cli import run
from equifeat.errors import EquifeatError
from equifeat.options import underscored
from tests.helpers import ROOT

GEOMETRY = sorted((ROOT / "equifeat" / "geometry").glob("*.py"))
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.is_file()
]
NO_TEST = "<!-- no-test -->"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks_of(page: str, text: str) -> list[Block]:
    """Fenced blocks, but those whose line before says no-test."""
    found = []
    for match in re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
        if NO_TEST not in before:
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1], match[2]))
    return found


BLOCKS = [
    block
    for page in PAGES
    for block in blocks_of(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))
]


def label(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.mark.parametrize("file", GEOMETRY, ids=lambda file: str(file.stem))
def test_conventions_in_docstrings(file: Path) -> None:
    name = "equifeat.geometry" + ("" if file.stem == "__init__" else f".{file.stem}")
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=FLAGS)
    assert result.failed == 0
    if file.stem in ("pixels", "camera"):
        assert result.attempted >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_doctests_of_pages(page: Path) -> None:
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8", optionflags=FLAGS)
    assert result.failed == 0
    if page.name == "conventions.md":
        assert result.attempted >= 20


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if b.language == "python" and ">>>" not in b.text],
    ids=label,
)
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec")
    exec(code, {"__name__": "__main__"})


def commands_of(block: Block) -> list[list[str]]:
    """The `equifeat ...` calls of a shell block, continuation lines joined, comments dropped."""
    lines = block.text.replace("\\\n", " ").splitlines()
    calls = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for position, word in enumerate(words):
            if Path(word).name == "equifeat":
                end = next(
                    (i for i, w in enumerate(words) if i > position and w in {"&&", "|", ";", ">"}),
                    len(words),
                )
                calls.append(words[position + 1 : end])
                break
    return calls


@cache
def help_of(*command: str) -> tuple[int, str]:
    """Exit code and text of `equifeat COMMAND --help`; tests/test_release.py runs real ones."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            run([*command, "--help"])
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    except EquifeatError as error:
        return 1, str(error)
    return 0, said.getvalue()


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in ("bash", "sh", "console")], ids=label
)
def test_commands_and_options_exist(block: Block) -> None:
    calls = [call for call in commands_of(block) if call and not call[0].startswith("-")]
    if calls and not (ROOT / "equifeat" / "cli.py").is_file():
        pytest.skip("there is no command line yet")
    for call in calls:
        path = [call[0]]
        code, text = help_of(*path)
        assert code == 0, f"{label(block)}: equifeat {' '.join(path)}: {text[-500:]}"
        # `evaluate equivariance`: a protocol is a further command when its own help exists.
        if call[0] == "evaluate" and len(call) > 1 and not call[1].startswith("-"):
            path.append(call[1])
            code, text = help_of(*path)
            assert code == 0, f"{label(block)}: equifeat {' '.join(path)}: {text[-500:]}"
        for word in call:
            if not word.startswith("--"):
                continue
            option = underscored(word).split("=")[0]
            known = set(re.findall(r"--[A-Za-z][\w.-]*", text))
            # Nested options of a class show up in its own help, --trainer in the parent's.
            shown = option in known or option.split(".")[0] in known
            assert shown, f"{label(block)}: equifeat {' '.join(path)} has no option {option}"


def test_blocks_are_found_and_no_test_is_obeyed() -> None:
    text = f"# T\n\n```python\nx = 1\n```\n\n{NO_TEST}\n```python\nboom()\n```\n\n```bash\na\n```\n"
    assert [(b.line, b.language, b.text) for b in blocks_of("p", text)] == [
        (3, "python", "x = 1\n"),
        (12, "bash", "a\n"),
    ]
    shell = Block("p", 1, "bash", "make x\n.venv/bin/equifeat fit --a \\\n  --b=1 && ls  # c\n")
    assert commands_of(shell) == [["fit", "--a", "--b=1"]]
