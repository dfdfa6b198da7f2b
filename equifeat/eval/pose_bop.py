"""6D localisation in BOP data sets: match an image to templates of the object, then PnP-RANSAC."""

from __future__ import annotations

from pathlib import Path

from equifeat.data.bop import BopImage, read_scene, read_targets, scene_folders
from equifeat.errors import EvalDataError
from equifeat.eval.bop_csv import write_bop_csv
from equifeat.eval.bop_data import BopData
from equifeat.eval.bop_detections import detections_file
from equifeat.eval.bop_models import BopModels, models_folder
from equifeat.eval.bop_protocols import PROTOCOLS, WHERE, BopOptions, check_options
from equifeat.eval.bop_templates import choose_templates
from equifeat.eval.data_hash import check_sums, data_hash
from equifeat.eval.protocol import Protocol
from equifeat.eval.task import Check

__all__ = ["PROTOCOLS", "WHERE", "BopData", "BopOptions", "check_bop", "open_bop", "write_bop_csv"]

TARGETS = "test_targets_bop19.json"
_LEAST_VISIBLE = 0.1
# Images and instances of the official targets (BOP Challenge 2020, table 1, arXiv 2009.07378).
_OFFICIAL = {
    "bop/ycbv-templates": {"YCB-V": (900, 4123)},
    "bop/lm-templates": {"LM-O": (200, 1445), "LM": (3000, 3000)},
}


def open_bop(root: Path, protocol: Protocol) -> BopData:
    """Open a BOP data set.

    Args:
        root: Its folder.
        protocol: One of `PROTOCOLS`, perhaps changed.

    Returns:
        Its test images, and templates of the objects in them.

    Raises:
        EvalDataError: The folder does not hold the data, or it is damaged.
        RecipeError: An option makes no sense.
    """
    options: BopOptions = protocol.options
    check_options(options)
    _need(root, options)
    models = BopModels(models_folder(root))
    found = _targets(root, options)
    objects = sorted({obj for _, targets in found.values() for obj in targets})
    for obj in objects:
        if not models.file(obj).is_file():
            raise EvalDataError(f"{models.file(obj)} is missing. {WHERE['bop']}")
    split = root / options.template_split
    templates = choose_templates(
        split, objects, options.templates, options.template_visible, protocol.seed
    )
    contents = [models.folder / "models_info.json", *(models.file(obj) for obj in objects)]
    contents += [p for p in (root / TARGETS, detections_file(root, options.detections)) if p]
    for folder in (*scene_folders(split), *{image.folder for image, _ in found.values()}):
        contents += [folder / f"scene_{name}.json" for name in ("camera", "gt", "gt_info")]
    chosen = [template.image for one in templates.values() for template in one]
    pictures = [p for image in [*chosen, *(i for i, _ in found.values())] for p in _files(image)]
    digest = data_hash(root, [p for p in contents if p.is_file()], pictures)
    return BopData(root, protocol, found, templates, models, digest)


def check_bop(root: Path, protocol: Protocol) -> Check:
    """Count and verify a BOP data set.

    Args:
        root: Its folder.
        protocol: One of `PROTOCOLS`, perhaps changed.

    Returns:
        Counts and problems.

    Raises:
        EvalDataError: The folder does not hold the data.
    """
    data = open_bop(root, protocol)
    counts = {
        "test images": len(data.items),
        "instances": sum(len(item.instances) for item in data.images),
        "objects": len({obj for item in data.images for obj in item.targets}),
        "templates": sum(map(len, data.localizer.templates.values())),
    }
    problems = []
    for item in data.images:
        where = f"{item.image.folder}: image {item.image.im_id}"
        if item.image.depth() is None and data.options.vsd:
            problems.append(f"{where} has no depth, which VSD needs")
        for obj, count in item.targets.items():
            true = sum(item.image.objects[i].obj_id == obj for i in item.instances)
            if true < count:
                problems.append(f"{where} has {true} of object {obj}, {TARGETS} asks for {count}")
        if data.options.detections == "visib_mask":
            problems += [
                f"{where} has no visible mask of instance {i}"
                for i in item.instances
                if item.image.mask_visib(i) is None
            ]
    compared, wrong = check_sums(root)
    notes = [f"data hash {data.data_hash}"]
    if compared:
        notes.append(f"{compared} files compared with SHA256SUMS")
    official = _OFFICIAL[protocol.id.partition("+")[0]]
    if (counts["test images"], counts["instances"]) not in official.values():
        said = " or ".join(f"{n} {i} images with {c} instances" for n, (i, c) in official.items())
        notes.append(f"these are not the official test targets ({said})")
    return Check(counts, [*problems, *wrong], notes)


def _need(root: Path, options: BopOptions) -> None:
    for path in (root, models_folder(root) / "models_info.json"):
        if not path.exists():
            raise EvalDataError(f"{path} is missing. {WHERE['bop']}")
    for split in (options.test_split, options.template_split):
        if not scene_folders(root / split):
            raise EvalDataError(
                f"{root / split} has no folder with scene_gt.json in it. {WHERE['bop']}"
            )


def _targets(root: Path, options: BopOptions) -> dict[str, tuple[BopImage, dict[int, int]]]:
    """By id, the test images and how many instances of each object are to be found."""
    wanted: dict[tuple[int, int], dict[int, int]] | None = None
    if (root / TARGETS).is_file():
        wanted = {}
        for target in read_targets(root / TARGETS):
            wanted.setdefault((target.scene_id, target.im_id), {})[target.obj_id] = (
                target.inst_count
            )
    found = {}
    for folder in scene_folders(root / options.test_split):
        scene = int(folder.name) if folder.name.isdecimal() else -1
        if scene < 0 or (wanted is not None and not any(s == scene for s, _ in wanted)):
            continue
        for image in read_scene(folder):
            if wanted is not None:
                targets = wanted.pop((scene, image.im_id), {})
            else:
                targets = {}
                for one in image.objects:
                    if one.visib_fract >= _LEAST_VISIBLE:
                        targets[one.obj_id] = targets.get(one.obj_id, 0) + 1
            if targets:
                image.picture()
                found[f"{scene:06d}/{image.im_id:06d}"] = (image, targets)
    if wanted:
        scene, im_id = next(iter(wanted))
        raise EvalDataError(
            f"{root / TARGETS} names image {im_id} of scene {scene} and {len(wanted) - 1} more "
            f"that {root / options.test_split} has no annotations of; unpack all test images, "
            "with public ground truth."
        )
    return found


def _files(image: BopImage) -> list[Path]:
    masks = (image.mask_visib(i) for i in range(len(image.objects)))
    return [p for p in (image.picture(), image.depth(), *masks) if p is not None]
