"""Strategy "fsdp2": DDP for what trains, FSDP2 shards for the frozen ViT."""

from __future__ import annotations

import warnings
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import (
    DDPStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from equifeat.errors import RecipeError
from equifeat.model.adapter import adapts_stored_weight
from equifeat.model.extractor import FeatureExtractor

NAME = "fsdp2"


class ShardedFrozenStrategy(DDPStrategy):
    """Each rank holds 1/W of the frozen ViT and gathers a block while it runs.

    LoRA and head are a few percent of the ViT; they stay whole on every rank, as under DDP. So
    clipping, checkpoints, optimiser states and the exported model are those of DDP.
    """

    strategy_name = NAME

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        extractor = model.extractor
        assert isinstance(extractor, FeatureExtractor)
        assert isinstance(model, LightningModule)
        # A rank that finds its views in the cache, or fails to compile, would not gather blocks
        # when the others do.
        for key, off in (("trunk_cache_mb", "0"), ("compile", "false")):
            if model.hparams[key]:
                raise RecipeError(
                    f"model.{key} does not go with trainer.strategy={NAME}: set it to {off}, or "
                    "use ddp"
                )
        mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        shard_frozen(extractor, mesh)
        sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
        # DDP would broadcast them at the start, as if they were the same everywhere.
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, sharded)
        return super()._setup_model(model)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make the name known to `trainer.strategy`.

        Args:
            strategy_registry: Lightning's.
        """
        if NAME not in strategy_registry:
            strategy_registry.register(NAME, cls, description=(cls.__doc__ or "").split("\n")[0])


def shard_frozen(extractor: FeatureExtractor, mesh: DeviceMesh) -> None:
    """Shard the frozen ViT over the processes of a mesh, block by block.

    Args:
        extractor: The model, the same on all ranks; changed in place.
        mesh: One-dimensional.

    Raises:
        RecipeError: LoRA reads a weight of a block outside of the block's forward.
    """
    backbone = extractor.backbone
    if extractor.adapter is not None and adapts_stored_weight(backbone.blocks):
        raise RecipeError(
            f"trainer.strategy={NAME} cannot shard {backbone.name!r}, whose attention reads the "
            "weights that LoRA changes without calling their layer: use trainer.strategy=ddp"
        )
    backbone.weights_hash()  # The exported model names it; afterwards no rank holds all weights.
    for block in backbone.blocks:
        fully_shard(block, mesh=mesh)
    # The root, which gathers a block while the one before it runs.
    fully_shard(backbone, mesh=mesh)
    for method in ("trunk", "layers"):
        register_fsdp_forward_method(backbone, method)
    # layers() returns views, which FSDP fears might be written to in place; nothing does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def check_strategy(strategy: object) -> None:
    """Refuse strategies whose checkpoints and model folders would be incomplete.

    Args:
        strategy: The trainer's strategy, or its name in a recipe; anything else passes.

    Raises:
        RecipeError: It is neither one device, nor DDP, nor "fsdp2".
    """
    if isinstance(strategy, str):
        good, name = strategy in ("auto", NAME) or strategy.startswith("ddp"), strategy
    elif isinstance(strategy, Strategy):
        good = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
        name = getattr(strategy, "strategy_name", None) or type(strategy).__name__
    else:
        return
    if not good:
        raise RecipeError(
            f"trainer.strategy={name} would scatter the few trained weights over the ranks: use "
            f"ddp, or {NAME}, which shards the frozen backbone"
        )


ShardedFrozenStrategy.register_strategies(StrategyRegistry)
