"""Data preparation: meshes to posed views with exact depth."""
