"""What several tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.synthetic import write_views


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    write_views(folder / "box", "box", views=6, size=64)
    return folder
