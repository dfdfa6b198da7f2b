"""What `equifeat features` does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from equifeat.errors import ImageError, RecipeError, import_extra
from equifeat.eval.models import extractor_hash, open_model
from equifeat.features.formats import Store, parse_out
from equifeat.features.loader import GridRule, ImageChunks, load_chunks
from equifeat.features.options import FeatureOptions, run_hash
from equifeat.features.pca import draw_all, set_key
from equifeat.features.pipeline import Pipeline, Tally
from equifeat.features.resume import FAILED, locked, start, write_index, write_lists
from equifeat.features.sources import Sources, find_sources
from equifeat.model.extractor import FeatureExtractor
from equifeat.model.precision import set_precision
from equifeat.progress import progress


def features_command(
    sources: Sequence[Path],
    model: str,
    out: Path,
    layers: Sequence[int] = (),
    format: str | None = None,
    pca: bool = False,
    resolution: int | None = None,
    at: str = "patch",
    overlap: int = 1,
    no_norm: bool = False,
    normalize: bool = False,
    dtype: str = "float32",
    precision: str = "float32",
    compile: bool = False,
    tile: int | None = None,
    tile_overlap: int | None = None,
    weights: str = "auto",
    batch: int = 16,
    workers: int | None = None,
    device: str = "auto",
    every: int = 1,
    root: Path | None = None,
    skip_errors: bool = False,
) -> str:
    """Write the features of images and videos; the same command goes on where it was stopped.

    Args:
        sources: Images, videos, folders with all below, globs, .txt lists with a path a line.
        model: A model folder or the name of a timm ViT.
        out: Folder for NAME.npz or NAME.safetensors, or a path that ends in .zarr; one of the words
            npz, safetensors and zarr means ./features in that format.
        layers: Blocks whose tokens are taken, as list indices: -1 is the last.
        format: npz, safetensors or zarr; npz when neither this nor --out tells.
        pca: Also draw NAME_pca.png, one basis of colours for all images.
        resolution: Patches on the longer side of the model's input; the image's own size when None.
        at: patch or image, a feature for every patch or every pixel.
        overlap: Patches start every patch_size / overlap pixels.
        no_norm: Leave out the ViT's final norm.
        normalize: Divide every feature by its L2 norm.
        dtype: Type of the stored numbers, float32 or float16.
        precision: Type in which the ViT computes, float32, bfloat16 or float16.
        compile: Compile the ViT's blocks with torch.compile.
        tile: Cut images into windows of so many patches a side, for images that are too large.
        tile_overlap: Patches that neighbouring windows share; a quarter of the tile when left out.
        weights: Weights of a raw model, auto, hub, packaged, random or a file.
        batch: Images of one size that go through the model at once.
        workers: Processes that read images; by the machine when None.
        device: auto, cpu, cuda, cuda:1, …
        every: Take each n-th frame of a video.
        root: Folder that names are relative to; the deepest that holds all sources when None.
        skip_errors: End well although images could not be read.

    Returns:
        What was written.

    Raises:
        ImageError: A source does not exist, or images could not be read; all others are written.
        RecipeError: An option is wrong, or the folder holds features of other options.
        FeaturesError: Features cannot be written.
    """
    asked = FeatureOptions(
        resolution=resolution,
        at=at,
        layers=tuple(layers) or (-1,),
        overlap=overlap,
        norm=not no_norm,
        normalize=normalize,
        dtype=dtype,
        precision=precision,
        tile=tile,
        tile_overlap=tile // 4 if tile is not None and tile_overlap is None else tile_overlap or 0,
    )
    for name, value, least in (("batch", batch, 1), ("every", every, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise RecipeError(f"--{name} {value} must be at least {least}")
    store = parse_out(out, format)
    found = find_sources(sources, root, skip=(store.out, store.side))
    if any(file.video for file in found.files):
        import_extra("av", "video", "reading video files")
    extractor = _open(model, weights, device, asked, compile)
    tally = Tally()
    with locked(store):
        begun = time.monotonic()
        model_hash = extractor_hash(extractor)
        run = run_hash(model_hash, asked)
        identity = {
            "model": model_hash,
            "file format": store.kind,
            "root": str(found.root),
            **asked.as_json(),
        }
        about = {
            "name": model,
            "backbone": extractor.backbone.name,
            "patch_size": extractor.patch_size,
            "dim": extractor.dim * len(asked.layers),
        }
        start(store, identity, about)
        rule = GridRule.of(extractor, asked.resolution)
        chunks = ImageChunks(found.files, rule, run, store.header, batch, every)
        workers = _workers(workers, found, batch, extractor)
        loaded = load_chunks(chunks, workers, extractor.backbone.device.type == "cuda")
        pipeline = Pipeline(extractor, asked, store, model, tally, batch)
        total = None if any(file.video for file in found.files) else len(found.files)
        for _ in progress(pipeline.run(loaded), "features", total):
            pass
        seconds = time.monotonic() - begun
        count = write_lists(store, tally.lines, tally.failed)
        pictures = _pictures(store, tally, run) if pca and tally.lines else None
        complete = not tally.failed
        write_index(
            store, identity, about, complete=complete, images=count, failed=len(tally.failed)
        )
    return _said(store, found, tally, seconds, pictures, skip_errors)


def _open(
    model: str, weights: str, device: str, asked: FeatureOptions, compiled: bool
) -> FeatureExtractor:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"--device {device} cannot be used here ({reason})") from error
    extractor = open_model(model, weights, device)
    # Options that this model cannot have are refused before anything is written.
    side = extractor.patch_size
    tiny = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    with torch.inference_mode():
        extractor.dense(tiny, overlap=asked.overlap, layers=asked.layers, norm=asked.norm)
    set_precision(extractor, asked.precision)
    return extractor.compile_blocks() if compiled else extractor


def _workers(asked: int | None, found: Sources, batch: int, extractor: FeatureExtractor) -> int:
    """Return how many loader processes are worth starting."""
    if asked is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        # On the CPU the model itself needs the cores.
        asked = min(8, cores) if extractor.backbone.device.type == "cuda" else min(2, cores)
    videos = sum(file.video for file in found.files)
    return min(asked, videos + -(-(len(found.files) - videos) // batch))


def _pictures(store: Store, tally: Tally, run: str) -> int:
    names = sorted(tally.lines)
    key = set_key(run, [tally.lines[name] for name in names])
    return draw_all(store, names, key, fresh=bool(tally.written))


def _said(
    store: Store,
    found: Sources,
    tally: Tally,
    seconds: float,
    pictures: int | None,
    skip_errors: bool,
) -> str:
    """Say what was done, or raise when images failed."""
    written, done = len(tally.written), len(tally.done)
    text = f"features of {written + done} images in {store.out}"
    if written:
        text += f": {written} computed in {seconds:.1f} s, {written / seconds:.1f} images/s"
    if done:
        text += f"{',' if written else ':'} {done} were there already"
    if pictures is not None:
        text += f"; {pictures} pictures in {store.side}"
    if not tally.failed:
        return text
    name, reason = min(tally.failed.items())
    problem = (
        f"{len(tally.failed)} of {len(tally.failed) + written + done} failed, listed in "
        f"{store.side / FAILED}; the first is {name}: {reason}"
    )
    if skip_errors:
        return f"{text}; {problem}"
    raise ImageError(f"{problem}; all others are written (--skip-errors ends without this error)")
