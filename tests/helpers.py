"""Where test inputs are."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def shared_dir(name: str) -> Path:
    """Return a folder of the shared test inputs beside the checkout, or skip the test."""
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"shared test inputs are not beside the checkout ({name})")
    return folder
