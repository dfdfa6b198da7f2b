"""The one thing setup.cfg cannot say: the wheel holds recipes/ as equifeat/recipes."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes into a wheel; an editable install reads them from the checkout."""

    def run(self) -> None:
        """Build the packages, then add the recipes."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "equifeat" / "recipes"
            # An older build may hold recipes that are gone.
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("recipes", target)


setup(cmdclass={"build_py": BuildWithRecipes})
