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
from equifeat.loss import info_nce, smooth_ap_terms
from equifeat.model.extractor import build_extractor
from equifeat.model.feature_map import FeatureMap
from equifeat.train.schedule import lr_factor
from equifeat.train.trunk_cache import TrunkCache


class EquivariantFinetune(pl.LightningModule):
    """Finetunes a feature extractor so that corresponding pixels get the same descriptor.

    Args:
        backbone: Name of a timm ViT.
        weights: "hub", "packaged", "random" or a file.
        head: "none", "conv" (the reference) or "residual" (untrained = exactly the raw ViT).
        lora_rank: Rank of the LoRA on q and v.
        lora_alpha: Scale is alpha/rank; None means alpha = rank, scale 1.
        lora_blocks: LoRA sits in this many last blocks; 0 trains the head alone.
        loss: "smooth_ap" or "info_nce".
        tau: Temperature of the loss.
        pos_radius: 3D points nearer than this are positives, in object units.
        neg_radius: 3D points farther than this are negatives, in object units.
        resolution: Patches on the longer side of the model's input; None keeps the image's size.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Optimiser steps of linear warm-up.
        schedule: "constant", or "cosine" down to zero at the last step.
        trunk_cache_mb: Memory for frozen tokens of un-augmented views; 0 switches the cache off.
        seed: Seed of the new weights (LoRA, head).
    """

    def __init__(
        self,
        backbone: str = "vit_small_patch14_dinov2.lvd142m",
        weights: str = "hub",
        head: Literal["none", "conv", "residual"] = "residual",
        lora_rank: int = 4,
        lora_alpha: float | None = None,
        lora_blocks: int = 4,
        loss: Literal["smooth_ap", "info_nce"] = "smooth_ap",
        tau: float = 0.01,
        pos_radius: float = 5e-3,
        neg_radius: float = 0.1,
        resolution: int | None = None,
        lr: float = 3e-4,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "constant",
        trunk_cache_mb: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.extractor = build_extractor(
            backbone,
            weights=weights,
            head=head,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_blocks=lora_blocks,
            seed=seed,
        )
        if not self.extractor.trainable_parameters():
            raise RecipeError("head=none with lora_blocks=0 trains nothing: choose a head or LoRA")
        self.cache = TrunkCache(trunk_cache_mb * 2**20)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss over the pairs of a batch.

        Args:
            batch: Pairs of views with keypoints.
            batch_idx: Index in the epoch, unused.

        Returns:
            Scalar loss.
        """
        return self._step(batch, "train")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean loss over held-out pairs.

        Args:
            batch: Pairs of views with keypoints.
            batch_idx: Index in the epoch, unused.

        Returns:
            Scalar loss.
        """
        return self._step(batch, "val")

    def _step(self, batch: PairBatch, stage: str) -> Tensor:
        hp = self.hparams
        b = len(batch)
        images = torch.cat([batch.images0, batch.images1])
        if hp["trunk_cache_mb"]:
            # A mesh may be rendered for training and for validation under one name.
            keys = [
                None if augmented else (f"{stage}/{key[0]}", key[1])
                for key, augmented in zip(
                    batch.keys0 + batch.keys1, batch.augmented0 + batch.augmented1, strict=True
                )
            ]
            state = self.cache.states(self.extractor, images, keys, hp["resolution"])
        else:
            state = self.extractor.trunk(images, hp["resolution"])
        maps = self.extractor.tail(state)
        losses, aps, positives = [], [], []
        for i in range(b):
            d0, d1 = (
                FeatureMap(maps.features[j : j + 1], maps.size_hw).sample(keypoints[i][None])[0]
                for j, keypoints in ((i, batch.keypoints0), (b + i, batch.keypoints1))
            )
            points = (batch.points3d0[i], batch.points3d1[i])
            radii = {"pos_radius": hp["pos_radius"], "neg_radius": hp["neg_radius"]}
            if hp["loss"] == "smooth_ap":
                terms = smooth_ap_terms(d0, d1, *points, tau=hp["tau"], **radii)
                losses.append(terms.loss)
                positives.append(float(terms.num_positives))
                if positives[-1]:
                    aps.append(terms.mean_ap)
            else:
                losses.append(info_nce(d0, d1, *points, temperature=hp["tau"], **radii))
        loss = torch.stack(losses).mean()
        self.log(f"{stage}/loss", loss.detach(), prog_bar=True, batch_size=b)
        if aps:
            self.log(f"{stage}/ap", torch.stack(aps).mean().detach(), prog_bar=True, batch_size=b)
        if positives:
            self.log(f"{stage}/positives", sum(positives) / b, batch_size=b)
        return loss

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
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
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
            state_dict: What :meth:`state_dict` gave.
            strict: Always strict, whatever is asked.
            assign: Unused.

        Returns:
            None.

        Raises:
            CheckpointError: Keys or shapes differ.
        """
        load_trainable_state(self.extractor, dict(state_dict))
