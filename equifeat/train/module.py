"""The LightningModule: a frozen ViT with LoRA and a head, trained on corresponding pixels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from equifeat.checkpoint import load_trainable_state, trainable_state
from equifeat.data.batch import PairBatch
from equifeat.errors import RecipeError
from equifeat.model.compiled import CompiledBlocks
from equifeat.model.extractor import build_extractor
from equifeat.model.feature_map import FeatureMap
from equifeat.model.head import HeadKind
from equifeat.train.distributed import all_sum
from equifeat.train.ema import AveragedWeights
from equifeat.train.negatives import NegativesKind, check_negatives
from equifeat.train.objective import LossKind, Objective, Totals
from equifeat.train.precision import apply_precision, full_float32
from equifeat.train.preserve import Preservation, PreserveKind, raw_features
from equifeat.train.schedule import lr_factor
from equifeat.train.sharded import check_strategy
from equifeat.train.trunk_cache import TrunkCache


class EquivariantFinetune(pl.LightningModule):
    """Finetunes a feature extractor so that corresponding pixels get the same descriptor.

    Args:
        backbone: Name of a timm ViT.
        weights: "hub", "packaged", "random" or a file.
        position: How a learned position embedding is resampled: "timm", or "reference" (as DINOv2's
            own code and the published recipe do).
        head: "none", "conv" (the reference) or "residual" (untrained = exactly the raw ViT).
        lora_rank: Rank of the LoRA on q and v.
        lora_alpha: Scale is alpha/rank; None means alpha = rank, scale 1.
        lora_blocks: LoRA sits in this many last blocks; 0 trains the head alone.
        loss: "smooth_ap", "multi_positive_ap", "info_nce", "soft_labels" or "transport".
        tau: Temperature of the loss.
        pos_radius: 3D points nearer than this are positives, in object units.
        neg_radius: 3D points farther than this are negatives, in object units.
        negatives: "pair": a pair's negatives are its own; "batch": also view 1 of the other pairs
            of the batch; "global": also those of all ranks (docs/distributed.md).
        max_negatives: Most negatives of other pairs that a pair is compared with.
        both_directions: Also compare view 1 with view 0, and take the mean.
        label_radius: Standard deviation of the labels of soft_labels, in object units.
        preserve: What is kept near the frozen ViT: "none", "features" or "relations" of patches
            (docs/preservation.md).
        preserve_weight: Weight of that term beside the loss.
        resolution: Patches on the longer side of the model's input; None keeps the image's size.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Optimiser steps of linear warm-up.
        schedule: "constant", or "cosine" down to zero at the last step.
        ema_decay: Decay of a moving average of the trained weights, which validation and the
            exported models take; 0 for none.
        trunk_cache_mb: Memory for what is frozen of views as they are rendered and of their fixed
            augmentations (`Augment.versions`); 0 switches the cache off.
        gradient_checkpointing: Run the adapted blocks again for their gradients: less memory.
        compile: Compile the blocks with torch.compile; without, after a warning, where that fails.
        seed: Seed of the new weights (LoRA, head) and of the choice of other pairs' negatives; None
            follows seed_everything in a recipe and is 0 elsewhere.
    """

    def __init__(
        self,
        backbone: str = "vit_small_patch14_dinov2.lvd142m",
        weights: str = "hub",
        position: Literal["timm", "reference"] = "timm",
        head: HeadKind = "none",
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        lora_blocks: int = 4,
        loss: LossKind = "info_nce",
        tau: float = 0.05,
        pos_radius: float = 5e-3,
        neg_radius: float = 0.1,
        negatives: NegativesKind = "pair",
        max_negatives: int = 4096,
        both_directions: bool = True,
        label_radius: float = 0.02,
        preserve: PreserveKind = "none",
        preserve_weight: float = 1.0,
        resolution: int | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "constant",
        ema_decay: float = 0.0,
        trunk_cache_mb: int = 0,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        seed = seed or 0
        self.save_hyperparameters()
        self.extractor = build_extractor(
            backbone,
            weights=weights,
            head=head,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_blocks=lora_blocks,
            position=position,
            seed=seed,
        )
        if not self.extractor.trainable_parameters():
            raise RecipeError("head=none with lora_blocks=0 trains nothing: choose a head or LoRA")
        self.objective = Objective(
            loss,
            tau,
            pos_radius,
            neg_radius,
            negatives,
            max_negatives,
            seed,
            both_directions=both_directions,
            label_radius=label_radius,
        )
        self.preservation = Preservation(preserve, preserve_weight, seed)
        self.average = AveragedWeights(ema_decay)
        self.extractor.recompute = gradient_checkpointing
        if compile:
            self.extractor.backbone.run_block = CompiledBlocks()
        self.cache = TrunkCache(trunk_cache_mb * 2**20)
        self._totals: dict[str, Totals | None] = {"train": None, "val": None}
        # Sum of the term over pairs, and their number.
        self._kept: dict[str, Tensor | None] = {"train": None, "val": None}
        self._validating = ExitStack()

    def setup(self, stage: str) -> None:
        """Refuse what cannot be right on these ranks; keep the frozen weights as they are used.

        Args:
            stage: Lightning's stage.
        """
        check_strategy(self.trainer.strategy)
        apply_precision(self.extractor, self.trainer.precision)
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if stage == "fit" and size is not None:
            check_negatives(self.objective.negatives, size, self.trainer.world_size)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss over the pairs of a batch.

        Args:
            batch: Pairs of views with keypoints.
            batch_idx: Index in the epoch, unused.

        Returns:
            Scalar loss.
        """
        return self._step(batch, "train")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the means over all pairs of the step: of all ranks and accumulated batches.

        Args:
            optimizer: The optimiser, unused.
        """
        self._log_totals("train")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss over held-out pairs.

        Args:
            batch: Pairs of views with keypoints.
            batch_idx: Index in the epoch, unused.

        Returns:
            Scalar loss.
        """
        return self._step(batch, "val")

    def on_validation_start(self) -> None:
        """Validate the average of the weights, where there is one."""
        self._validating.enter_context(self.averaged())

    def on_validation_epoch_end(self) -> None:
        """Log the means over all held-out pairs of all ranks."""
        self._log_totals("val")

    def on_validation_end(self) -> None:
        """Go on with the weights themselves."""
        self._validating.close()

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the averaged weights, with `ema_decay`.

        Returns:
            The context; it changes nothing without `ema_decay` and before the first step.
        """
        return self.average.lent_to(self.extractor.trainable_parameters())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make an optimiser step, and average the weights.

        Args:
            *args: Lightning's.
            **kwargs: Lightning's.
        """
        super().optimizer_step(*args, **kwargs)
        self.average.update(self.extractor.trainable_parameters())

    def _step(self, batch: PairBatch, stage: str) -> Tensor:
        maps, raw = self._features(batch, stage)
        with full_float32():
            loss, totals = self.objective(maps, batch, training=stage == "train")
            if raw is not None:
                term = self.preservation(maps, raw, batch)
                loss = loss + self.preservation.weight * term
                kept = torch.stack([term.detach() * len(batch), totals.pairs.to(term)])
                before = self._kept[stage]
                self._kept[stage] = kept if before is None else kept + before
        self._totals[stage] = totals.plus(self._totals[stage])
        return loss

    def _features(self, batch: PairBatch, stage: str) -> tuple[FeatureMap, FeatureMap | None]:
        """Return the features of all views 0, then of all views 1; and, if needed, the raw ones."""
        images, resolution = torch.cat([batch.images0, batch.images1]), self.hparams["resolution"]
        wanted = self.preservation.kind != "none"
        if self.hparams["trunk_cache_mb"]:
            # A mesh may be rendered for training and for validation under one name.
            views = zip(batch.keys0 + batch.keys1, batch.versions0 + batch.versions1, strict=True)
            keys = [None if n is None else (f"{stage}/{key[0]}", key[1], n) for key, n in views]
            state, raw = self.cache.views(self.extractor, images, keys, resolution, wanted)
        else:
            state = self.extractor.trunk(images, resolution)
            raw = raw_features(self.extractor, state) if wanted else None
        maps = self.extractor.tail(state)
        return maps, None if raw is None else FeatureMap(raw, state.size_hw, state.margin_yx)

    def _log_totals(self, stage: str) -> None:
        totals, self._totals[stage] = self._totals[stage], None
        if totals is None:
            return
        means = totals.over_ranks().means()
        kept, self._kept[stage] = self._kept[stage], None
        if kept is not None:
            total = all_sum(kept)
            means["preserve"] = total[0] / total[1]
        for name, value in means.items():
            if name != "ap" or self.objective.has_ap:
                self.log(
                    f"{stage}/{name}",
                    value,
                    prog_bar=name != "positives",
                    batch_size=1,
                    sync_dist=stage == "val",  # The ranks agree already: Lightning cannot know.
                )

    def configure_optimizers(self) -> Any:
        """Return AdamW over the trainable weights, with warm-up and cosine if asked for.

        Returns:
            Lightning's optimiser configuration.
        """
        hp = self.hparams
        optimizer = torch.optim.AdamW(
            self.extractor.trainable_parameters().values(),
            lr=hp["lr"],
            weight_decay=hp["weight_decay"],
        )
        total = self.trainer.estimated_stepping_batches
        factor = lr_factor(hp["schedule"], hp["warmup_steps"], total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "train/lr"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the averaged weights beside the trained ones.

        Args:
            checkpoint: What Lightning is about to write.
        """
        if self.average.decay:
            checkpoint["averaged_weights"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the averaged weights of a run that has them.

        Args:
            checkpoint: What Lightning has read.

        Raises:
            CheckpointError: They are of another model.
        """
        if self.average.decay and "averaged_weights" in checkpoint:
            parameters = self.extractor.trainable_parameters()
            self.average.load_state_dict(checkpoint["averaged_weights"], parameters)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trainable weights only: the frozen backbone comes from its own file.

        Returns:
            Trainable tensors by name.
        """
        return trainable_state(self.extractor)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load trainable weights; every key must be there and nothing else.

        Args:
            state_dict: What `state_dict` gave.
            strict: Always strict, whatever is asked.
            assign: Unused.

        Returns:
            None.

        Raises:
            CheckpointError: Keys or shapes differ.
        """
        load_trainable_state(self.extractor, dict(state_dict))
