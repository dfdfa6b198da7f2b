"""The LightningModule: a frozen ViT with LoRA and a head, trained on corresponding pixels."""

from __future__ import annotations

from collections.abc import Mapping
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
from equifeat.train.negatives import NegativesKind, check_negatives
from equifeat.train.objective import LossKind, Objective, Totals
from equifeat.train.precision import apply_precision, full_float32
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
        loss: "smooth_ap" or "info_nce".
        tau: Temperature of the loss.
        pos_radius: 3D points nearer than this are positives, in object units.
        neg_radius: 3D points farther than this are negatives, in object units.
        negatives: "pair": a pair's negatives are its own; "batch": also view 1 of the other pairs
            of the batch; "global": also those of all ranks (docs/distributed.md).
        max_negatives: Most negatives of other pairs that a pair is compared with.
        resolution: Patches on the longer side of the model's input; None keeps the image's size.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Optimiser steps of linear warm-up.
        schedule: "constant", or "cosine" down to zero at the last step.
        trunk_cache_mb: Memory for frozen tokens of un-augmented views; 0 switches the cache off.
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
        head: Literal["none", "conv", "residual"] = "residual",
        lora_rank: int = 4,
        lora_alpha: float | None = None,
        lora_blocks: int = 4,
        loss: LossKind = "smooth_ap",
        tau: float = 0.01,
        pos_radius: float = 5e-3,
        neg_radius: float = 0.1,
        negatives: NegativesKind = "pair",
        max_negatives: int = 4096,
        resolution: int | None = None,
        lr: float = 3e-4,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "constant",
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
            loss, tau, pos_radius, neg_radius, negatives, max_negatives, seed
        )
        self.extractor.recompute = gradient_checkpointing
        if compile:
            self.extractor.backbone.run_block = CompiledBlocks()
        self.cache = TrunkCache(trunk_cache_mb * 2**20)
        self._totals: dict[str, Totals | None] = {"train": None, "val": None}

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

    def on_validation_epoch_end(self) -> None:
        """Log the means over all held-out pairs of all ranks."""
        self._log_totals("val")

    def _step(self, batch: PairBatch, stage: str) -> Tensor:
        maps = self._features(batch, stage)
        with full_float32():
            loss, totals = self.objective(maps, batch, training=stage == "train")
        self._totals[stage] = totals.plus(self._totals[stage])
        return loss

    def _features(self, batch: PairBatch, stage: str) -> FeatureMap:
        """Return the features of all views 0, then of all views 1."""
        images, resolution = torch.cat([batch.images0, batch.images1]), self.hparams["resolution"]
        if not self.hparams["trunk_cache_mb"]:
            return self.extractor.tail(self.extractor.trunk(images, resolution))
        # A mesh may be rendered for training and for validation under one name.
        views = zip(batch.keys0 + batch.keys1, batch.augmented0 + batch.augmented1, strict=True)
        keys = [None if changed else (f"{stage}/{key[0]}", key[1]) for key, changed in views]
        return self.extractor.tail(self.cache.states(self.extractor, images, keys, resolution))

    def _log_totals(self, stage: str) -> None:
        totals, self._totals[stage] = self._totals[stage], None
        if totals is None:
            return
        for name, value in totals.over_ranks().means().items():
            if name != "ap" or self.objective.loss == "smooth_ap":
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
