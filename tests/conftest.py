"""Shapes are checked by beartype under pytest only; the suite needs no network and no hub."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (named below)

install_import_hook("equifeat", "tests.typecheck.check")
install_import_hook("data_prep", "tests.typecheck.check")

import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get("EQUIFEAT_TEST_THREADS", "1")))
