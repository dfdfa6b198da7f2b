"""Shapes are checked by beartype under pytest only; the suite needs no network and no hub."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook

install_import_hook("equifeat", "beartype.beartype")
install_import_hook("data_prep", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get("EQUIFEAT_TEST_THREADS", "1")))
