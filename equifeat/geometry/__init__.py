"""Geometry: the pixel convention, cameras, covisibility."""
