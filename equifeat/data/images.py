"""Photographs as the data layer reads them; `equifeat.image_files` does it."""

from __future__ import annotations

from equifeat.image_files import read_image as read_image
