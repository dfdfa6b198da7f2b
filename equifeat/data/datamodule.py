"""The order of draws over ranks and epochs, and the LightningDataModule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from equifeat.data.augment import Augment
from equifeat.data.batch import PairBatch as PairBatch
from equifeat.data.batch import collate_pairs as collate_pairs
from equifeat.data.pairs import Pair, PairSource, Sampler
from equifeat.data.views import CaptureOptions, Layout, open_views
from equifeat.data.workers import shield_worker
from equifeat.errors import EquifeatError, RecipeError


class DrawSampler(DistributedSampler[int]):
    """Says which draws this rank makes next.

    Batches of the whole run are counted through, over all epochs: batch g of rank r of W holds the
    draws (g W + r) B ... (g W + r + 1) B - 1. So ranks are disjoint, epochs differ, and a resumed
    run goes on where it stopped. (A DistributedSampler, because Lightning puts its own around
    anything else.)

    Args:
        source: Where the draws come from; its length is one epoch of all ranks.
        batch_size: Pairs in a batch of one rank, B.
        num_replicas: Number of ranks, W.
        rank: This rank, r.
        position: Batches already trained in this run, asked for at the start of every epoch; None
            counts epochs by set_epoch.
        fixed: Every epoch is the same (validation).
        accumulate: Batches of one optimiser step; an epoch holds whole steps only.
    """

    def __init__(
        self,
        source: PairSource,
        batch_size: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
        position: Callable[[], int] | None = None,
        fixed: bool = False,
        accumulate: int = 1,
    ) -> None:
        super().__init__(source, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.batch_size = batch_size
        self.fixed = fixed
        self.position = position
        self.batches = len(source) // (batch_size * num_replicas * accumulate) * accumulate
        if self.batches == 0:
            steps = f"{accumulate} batches" if accumulate > 1 else "one batch"
            raise RecipeError(
                f"{len(source)} draws an epoch are less than {steps} of {batch_size} on each of "
                f"{num_replicas} ranks: raise the number of draws or lower batch_size"
            )
        # A resumed run may have another batch size or number of ranks: it goes on after the draws
        # that were made, whatever made them.
        self._base_batch = 0
        self._base_draw = 0

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self._consumed_batches()
        per_batch = self.num_replicas * self.batch_size
        draws = [
            self._first_draw(first) + g * per_batch + self.rank * self.batch_size + j
            for g in range(self.batches)
            for j in range(self.batch_size)
        ]
        return iter(draws)

    def state_dict(self) -> dict[str, int]:
        """Return where the run is.

        Returns:
            Number of batches trained and the first draw that was not.
        """
        batches = self._consumed_batches()
        return {"batches": batches, "draws": self._first_draw(batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another run stopped.

        Args:
            state: What `state_dict` gave.
        """
        self._base_batch, self._base_draw = state["batches"], state["draws"]

    def _consumed_batches(self) -> int:
        if self.fixed:
            return 0
        if self.position is not None:
            return self.position()
        return self._base_batch + self.epoch * self.batches

    def _first_draw(self, batch: int) -> int:
        return self._base_draw + (batch - self._base_batch) * self.num_replicas * self.batch_size


class DrawLoader(DataLoader[Pair]):
    """A DataLoader whose place in the run is saved and restored by Lightning.

    Attributes:
        seconds_waited: Seconds that whoever iterates has waited for batches so far.
    """

    seconds_waited = 0.0

    def __iter__(self) -> Iterator[PairBatch]:  # type: ignore[override]
        try:
            started = time.monotonic()
            for batch in super().__iter__():
                self.seconds_waited += time.monotonic() - started
                yield batch
                started = time.monotonic()
        except EquifeatError as error:
            # A worker's error comes with its traceback as text; its last line is the sentence.
            last = str(error).rstrip().rsplit("\n", 1)
            if len(last) == 1:
                raise
            raise type(error)(last[1].partition(": ")[2]) from error

    def state_dict(self) -> dict[str, int]:
        """Return the sampler's state; Lightning saves it in the checkpoint.

        Returns:
            See `DrawSampler.state_dict`.
        """
        assert isinstance(self.sampler, DrawSampler)
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the sampler; Lightning calls this before the first batch of a resumed run.

        Args:
            state: What `state_dict` gave.
        """
        assert isinstance(self.sampler, DrawSampler)
        self.sampler.load_state_dict(state)


class PairDataModule(pl.LightningDataModule):
    """Training and validation pairs from folders of rendered views.

    Args:
        views: A view folder or a folder of them, to train on.
        val_views: The same for validation; None trains without.
        seed: Seed of the draws; None follows seed_everything in a recipe and is 0 elsewhere.
        batch_size: Pairs in a batch of one rank.
        num_workers: Loader processes of one rank; any number gives the same draws.
        sampler: "covisible" (true matches), "hard" (true matches, half of them in clusters) or
            "reference" (independent mask pixels).
        num_keypoints: Keypoints a view.
        min_keypoints: Fewer than this in a view make another pair of views be drawn.
        min_angle_deg: Smallest view change of a pair in degrees.
        max_angle_deg: Largest view change of a pair in degrees.
        augment: True for the reference's ranges, False for none, or the ranges themselves.
        background: "black", "noise", "gradient" or a folder of images, for training.
        draws_per_epoch: Pairs of one epoch, over all ranks.
        val_draws: Pairs of one validation, always the same ones, not augmented.
        layout: Layout of the view folders: "auto", "equifeat", "packed", "reference", "colmap",
            "mvimgnet" or "co3d".
        pin_memory: Copy batches to pinned memory, for a GPU.
        captures: How photographs (colmap, mvimgnet, co3d) are read; None for the defaults.
        hard_radius: Radius of the clusters of sampler "hard", in object units.
        curriculum_draws: Training draws over which the largest view change grows linearly from
            `curriculum_start_deg` to `max_angle_deg`; 0 for none.
        curriculum_start_deg: Largest view change of the first draw.
    """

    def __init__(
        self,
        views: str | Path,
        val_views: str | Path | None = None,
        seed: int | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        sampler: Sampler = "covisible",
        num_keypoints: int = 1024,
        min_keypoints: int = 32,
        min_angle_deg: float = 0.0,
        max_angle_deg: float = 120.0,
        augment: bool | Augment = True,
        background: str = "black",
        draws_per_epoch: int = 10_000,
        val_draws: int = 64,
        layout: Layout = "auto",
        pin_memory: bool = False,
        captures: CaptureOptions | None = None,
        hard_radius: float = 0.15,
        curriculum_draws: int = 0,
        curriculum_start_deg: float = 30.0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise RecipeError(
                f"batch_size is {batch_size} and num_workers {num_workers}: use at least 1 and 0"
            )
        self.views = Path(views)
        self.val_views = None if val_views is None else Path(val_views)
        self.seed = seed or 0
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.sampler: Sampler = sampler
        self.num_keypoints = num_keypoints
        self.min_keypoints = min_keypoints
        self.min_angle_deg = min_angle_deg
        self.max_angle_deg = max_angle_deg
        if isinstance(augment, bool):
            self.augment = Augment() if augment else None
        else:
            self.augment = augment
        self.background = background
        self.draws_per_epoch = draws_per_epoch
        self.val_draws = val_draws
        self.layout: Layout = layout
        self.pin_memory = pin_memory
        self.captures = captures
        self.hard_radius = hard_radius
        self.curriculum_draws = curriculum_draws
        self.curriculum_start_deg = curriculum_start_deg
        self.train_source: PairSource | None = None
        self.val_source: PairSource | None = None

    def record(self) -> dict[str, Any]:
        """Say what pairs are drawn from and how, for config.json and the card of a model.

        Returns:
            Plain values.
        """
        source = self.train_source
        return {
            "views": str(self.views),
            "layout": self.layout,
            "objects": None if source is None else len(source.objects),
            "sampler": self.sampler,
            "num_keypoints": self.num_keypoints,
            "angles_deg": [self.min_angle_deg, self.max_angle_deg],
            "curriculum_draws": self.curriculum_draws,
            "augment": self.augment is not None,
            "background": self.background,
            "batch_size": self.batch_size,
            "ranks": self.trainer.world_size if self.trainer else 1,
            "seed": self.seed,
        }

    def setup(self, stage: str | None = None) -> None:
        """Open the view folders.

        Args:
            stage: Lightning's stage; training views are opened for "fit" or None only.

        Raises:
            ViewsError: A folder cannot be read.
            RecipeError: A stage other than fit without val_views.
        """
        if stage in (None, "fit") and self.train_source is None:
            self.train_source = self._source(self.views, training=True)
        if self.val_views is not None and self.val_source is None:
            self.val_source = self._source(self.val_views, training=False)
        if self.val_views is None:
            if stage not in (None, "fit"):
                raise RecipeError("there is nothing to validate on: set data.val_views")
            if self.trainer is not None:
                # Lightning's own switch for a run without validation.
                self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> DrawLoader:
        """Return the loader of training pairs; it goes on where a resumed run stopped.

        Returns:
            Batches as PairBatch.
        """
        if self.train_source is None:
            self.setup("fit")
        assert self.train_source is not None
        return self._loader(self.train_source, training=True)

    def val_dataloader(self) -> DrawLoader:
        """Return the loader of validation pairs.

        Returns:
            Batches as PairBatch, the same every time.

        Raises:
            RecipeError: val_views is not set.
        """
        if self.val_source is None:
            self.setup("validate")
        assert self.val_source is not None
        return self._loader(self.val_source, training=False)

    def _source(self, folder: Path, training: bool) -> PairSource:
        return PairSource(
            open_views(folder, self.layout, self.captures),
            seed=self.seed,
            sampler=self.sampler,
            num_keypoints=self.num_keypoints,
            min_keypoints=self.min_keypoints,
            min_angle_deg=self.min_angle_deg,
            max_angle_deg=self.max_angle_deg,
            augment=self.augment if training else None,
            background=self.background if training else "black",
            length=self.draws_per_epoch if training else self.val_draws,
            stream=0 if training else 1,
            hard_radius=self.hard_radius,
            curriculum_draws=self.curriculum_draws if training else 0,
            curriculum_start_deg=self.curriculum_start_deg,
        )

    def _loader(self, source: PairSource, training: bool) -> DrawLoader:
        trainer = self.trainer
        draws = DrawSampler(
            source,
            self.batch_size,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            position=self._trained_batches if training and trainer else None,
            fixed=not training,
            accumulate=trainer.accumulate_grad_batches if training and trainer else 1,
        )
        return DrawLoader(
            source,
            batch_size=self.batch_size,
            sampler=draws,
            num_workers=self.num_workers,
            collate_fn=collate_pairs,
            drop_last=True,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
            worker_init_fn=shield_worker,
            # Its own: an epoch begun by a resumed run must not move the global random numbers.
            generator=torch.Generator(),
        )

    def _trained_batches(self) -> int:
        """Batches of this run whose training step is done, also by the run that was resumed."""
        assert self.trainer is not None
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(done.processed)  # type: ignore[attr-defined]
