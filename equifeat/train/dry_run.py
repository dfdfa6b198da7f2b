"""``fit --dry-run``: a few real steps of a recipe, and what they say of the whole run."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from equifeat.data.batch import PairBatch
from equifeat.data.datamodule import PairDataModule
from equifeat.model.compiled import CompiledBlocks, run_block
from equifeat.train.module import EquivariantFinetune

WARM_UP, MEASURED = 2, 5
# After this long, one measured step is enough.
_SECONDS = 60.0
_LONG_EPOCH = 100_000
_MIB = 2**20


def dry_run_config(config: Any) -> None:
    """Change a parsed recipe so that it makes a few steps and writes nothing.

    Args:
        config: Configuration of fit.
    """
    batches = (WARM_UP + MEASURED) * config["trainer"]["accumulate_grad_batches"]
    config["trainer"]["fast_dev_run"] = batches
    config["trainer"]["enable_model_summary"] = False
    config["data"]["val_views"] = None
    # The steps must fit into one epoch; draws do not depend on its length.
    config["data"]["draws_per_epoch"] = _LONG_EPOCH
    config["ckpt_path"] = None


@dataclass
class Stopwatch(pl.Callback):
    """Measures steps, waiting for data and memory, and notes how attention is computed.

    Attributes:
        seconds: Of each step, from the end of the one before.
        waits: What of each step was waiting for data.
        attention: Names of the attention operations of PyTorch that ran; empty when none did.
        peak_bytes: On a GPU the most memory allocated; on the CPU what the steps added.
    """

    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self._memory = _ResidentPeak()
        self._first = self._last = self._batch_end = self._waited = 0.0
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the memory watch."""
        self._step = trainer.global_step
        self._memory.start(pl_module.device)
        self._first = self._last = self._batch_end = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how long the batch was waited for."""
        _wait_for(pl_module.device)
        self._waited += time.perf_counter() - self._batch_end
        if not self.attention and isinstance(pl_module, EquivariantFinetune):
            with trainer.precision_plugin.forward_context():
                self.attention = attention_operations(pl_module, batch)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note how long the step took."""
        _wait_for(pl_module.device)
        self._batch_end = now = time.perf_counter()
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.seconds.append(now - self._last)
        self.waits.append(self._waited)
        self._last, self._waited = now, 0.0
        if now - self._first > _SECONDS and len(self.seconds) > 1:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the peak of memory."""
        self.peak_bytes = self._memory.stop(pl_module.device)

    def measured(self) -> tuple[float, float, int]:
        """Return what counts: steps after the warm-up, or the last one of very few.

        Returns:
            Median seconds a step, share of them spent waiting for data, number of steps.
        """
        first = min(WARM_UP, len(self.seconds) - 1)
        seconds, waits = self.seconds[first:], self.waits[first:]
        return statistics.median(seconds), sum(waits) / sum(seconds), len(seconds)


class _ResidentPeak:
    """Watches the most memory that is in use."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._before = self._peak = 0

    def start(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._before = self._peak = _resident_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self, device: torch.device) -> int:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self._peak = max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    """Return the process's memory; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * 4096


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _AttentionNames(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.name().removeprefix("aten::")
        if "attention" in name and name not in self.names:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _uncompiled(module: EquivariantFinetune) -> Iterator[None]:
    backbone = module.extractor.backbone
    before, backbone.run_block = backbone.run_block, run_block
    try:
        yield
    finally:
        backbone.run_block = before


def attention_operations(module: EquivariantFinetune, batch: PairBatch) -> list[str]:
    """Run one view through the model and see which attention operations PyTorch chooses.

    Args:
        module: The module, on its device.
        batch: A batch.

    Returns:
        Names of operations, such as _scaled_dot_product_flash_attention; none where attention is
        written out as products and a softmax.
    """
    seen = _AttentionNames()
    with _uncompiled(module), seen:
        state = module.extractor.trunk(batch.images0[:1], module.hparams["resolution"])
        module.extractor.tail(state)
    return seen.names


def report(trainer: pl.Trainer, watch: Stopwatch, planned: Any) -> str:
    """Write what a dry run found.

    Args:
        trainer: The trainer, after its few steps.
        watch: What was measured.
        planned: Configuration of fit before `dry_run_config`.

    Returns:
        Lines of text.
    """
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    assert isinstance(module, EquivariantFinetune)
    assert isinstance(data, PairDataModule)
    assert data.train_source is not None
    seconds, waiting, counted = watch.measured()
    per_step = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    steps = _planned_steps(planned["trainer"], planned["data"]["draws_per_epoch"] // per_step)
    objects = data.train_source.objects
    views = sum(len(one) for one in objects)
    device = module.device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    of_what = "GPU memory" if device.type == "cuda" else "added to the process by the steps"
    runner = module.extractor.backbone.run_block
    compiled = "no"
    if isinstance(runner, CompiledBlocks):
        compiled = f"failed ({runner.failure})" if runner.failure else "yes"
    trained = sum(p.numel() for p in module.extractor.trainable_parameters().values())
    again = "yes" if module.extractor.recompute else "no"
    ends = f"{steps * seconds / 3600:.2f} h for {steps} steps" if steps else "no end is set"
    lines = [
        f"{'part':<22}{'trainable':>14}{'frozen':>14}{'MiB':>10}",
        *_parts(module),
        "",
        f"optimizer          {_mib(2 * 4 * trained)}, gradients {_mib(4 * trained)} (float32)",
        f"peak memory        {_mib(watch.peak_bytes)} {of_what}",
        f"seconds a step     {seconds:.3g} (median of {counted} after a warm-up), "
        f"{waiting:.0%} of it waiting for data",
        f"pairs a step       {per_step} ({data.batch_size} a batch, {trainer.world_size} ranks, "
        f"{trainer.accumulate_grad_batches} batches accumulated)",
        f"whole run          {ends}",
        f"device             {on}, {trainer.world_size} in all",
        f"precision          {trainer.precision}, loss in float32, TF32 "
        f"{'on' if torch.get_float32_matmul_precision() != 'highest' else 'off'}",
        f"attention          {_attention(module, watch.attention)}",
        f"compiled           {compiled}",
        f"checkpointing      {again}",
        f"data               {len(objects)} objects, {views} views, "
        f"{data.train_source.num_view_pairs} view pairs to draw from",
    ]
    return "\n".join(lines)


def _planned_steps(planned: Any, per_epoch: int) -> int:
    """Return the steps of the whole run, 0 for no end."""
    steps, epochs = planned["max_steps"], planned["max_epochs"]
    of_epochs = epochs * per_epoch if epochs not in (None, -1) else 0
    if steps is None or steps < 0:
        # Lightning's own default where neither is set.
        return of_epochs or (1000 * per_epoch if epochs is None else 0)
    return min(steps, of_epochs) if of_epochs else int(steps)


def _parts(module: EquivariantFinetune) -> Iterable[str]:
    extractor = module.extractor
    blocks = extractor.backbone.blocks
    tail = blocks[len(blocks) - extractor.tail_blocks :]
    in_tail = {id(p) for block in tail for p in block.parameters()}
    frozen = list(extractor.backbone.parameters())
    parts: dict[str, list[Tensor]] = {
        "trunk": [p for p in frozen if id(p) not in in_tail],
        f"{len(tail)} adapted blocks": [p for p in frozen if id(p) in in_tail],
        "LoRA": _weights(extractor.adapter),
        "head": _weights(extractor.head),
    }
    parts["all"] = [p for part in list(parts.values()) for p in part]
    for name, weights in parts.items():
        trained = sum(p.numel() for p in weights if p.requires_grad)
        size = sum(p.numel() * p.element_size() for p in weights)
        held = sum(p.numel() for p in weights) - trained
        yield f"{name:<22}{trained:>14,}{held:>14,}{size / _MIB:>10.1f}"


def _weights(part: nn.Module | None) -> list[Tensor]:
    return [] if part is None else list(part.parameters())


def _mib(size: float) -> str:
    return f"{size / _MIB:.1f} MiB"


def _attention(module: EquivariantFinetune, names: list[str]) -> str:
    if not names:
        return "written out (softmax of a whole matrix), because timm does not fuse it here"
    readable = ", ".join(name.lstrip("_") for name in names)
    return f"fused: {readable}"
