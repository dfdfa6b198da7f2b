"""A virtual environment that holds what `pip install equifeat` brings, and no more.

Nothing is downloaded: the packages of this environment that equifeat requires, directly or not,
are linked into a new one. What only an extra brings is absent there.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT

# What no build reads.
_SKIPPED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "golden", "build", "dist", "site", "runs", "demo_out"
)


def run(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with nothing of this checkout in sight."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONWARNINGS")
    inherited = {key: value for key, value in os.environ.items() if key not in dropped}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**inherited, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def pip(*words: str | Path, cwd: Path) -> None:
    """Run pip without an index."""
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    done = run(sys.executable, "-m", "pip", *words, cwd=cwd, **offline)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_checkout(folder: Path) -> Path:
    """Copy the checkout without what git ignores: building must not write into it."""
    shutil.copytree(ROOT, folder, ignore=_SKIPPED)
    return folder


def build_wheel(source: Path, out: Path) -> Path:
    """Build a wheel from a folder or a source distribution."""
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel


def build_sdist(source: Path, out: Path) -> Path:
    """Build a source distribution, through the same hook as `python -m build`."""
    out.mkdir(parents=True)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})"
    done = run(sys.executable, "-c", code, cwd=source)
    assert done.returncode == 0, done.stderr
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def required() -> dict[str, importlib.metadata.Distribution]:
    """Distributions that equifeat requires without any extra, directly or not, by name."""
    installed: dict[str, importlib.metadata.Distribution] = {
        canonicalize_name(found.metadata["Name"]): found
        for found in importlib.metadata.distributions()
    }
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [("equifeat", "")]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or name not in installed:
            continue
        seen.add((name, extra))
        found[name] = installed[name]
        for text in installed[name].requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                needs = canonicalize_name(needed.name)
                todo += [(needs, more) for more in ("", *needed.extras)]
    del found["equifeat"]
    return found


def clean_env(folder: Path, wheel: Path) -> Path:
    """Make the environment, install a wheel into it and return its folder of programs."""
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in required().values():
        files = distribution.files or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source, target = Path(str(distribution.locate_file(top))), packages / top
            if source.exists() and not target.exists():
                target.symlink_to(source)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder.parent)
    return folder / "bin"
