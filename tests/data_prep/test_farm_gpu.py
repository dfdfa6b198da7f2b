from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep import farm_gpu
from data_prep.farm_gpu import (
    choose_device,
    egl_cuda_ids,
    pin_worker,
    software_on_gpu_node,
    visible_cuda_ids,
)

LLVMPIPE = "llvmpipe (LLVM 15.0.6, 256 bits)"


@pytest.mark.parametrize(
    ("egl", "visible", "expected"),
    [
        # EGL lists the CPU's device last, and the GPUs in another order than CUDA
        ([2, 0, 1, None], None, [1, 2, 0, 1]),
        ([2, 0, 1, None], [1], [2, 2, 2, 2]),
        ([2, 0, 1, None], [2, 0], [0, 1, 0, 1]),
        # no GPU that may be used: nothing is pinned
        ([None], None, [None] * 4),
        ([], None, [None] * 4),
        ([0, 1, None], [], [None] * 4),
        ([0, 1, None], [7], [None] * 4),
    ],
)
def test_workers_take_turns_on_the_visible_gpus(
    egl: list[int | None], visible: list[int] | None, expected: list[int | None]
) -> None:
    assert [choose_device(i, egl, visible) for i in range(4)] == expected


def test_cuda_visible_devices() -> None:
    uuids = ["GPU-aa11", "GPU-bb22"]

    def read(text: str) -> list[int] | None:
        return visible_cuda_ids({"CUDA_VISIBLE_DEVICES": text}, uuids)

    assert visible_cuda_ids({}) is None
    assert read("0, 3") == [0, 3]
    assert read("GPU-bb22,0") == [1, 0]
    assert read("GPU-b") == [1]
    # like CUDA: nothing behind the first entry that is no GPU
    assert read("1,-1,0") == [1]
    assert read("") == []
    assert read("GPU-") == []


def test_egl_answers_or_is_not_there() -> None:
    for cuda in egl_cuda_ids():
        assert cuda is None or cuda >= 0


def test_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    # set first: so that undoing, which goes backwards, ends without it
    monkeypatch.setenv("EGL_DEVICE_ID", "0")
    monkeypatch.delenv("EGL_DEVICE_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(farm_gpu, "egl_cuda_ids", lambda: [1, 3, 0, 2, None])
    monkeypatch.setattr(Path, "exists", lambda self: False)
    pin_worker(0)  # no NVIDIA driver here: whatever EGL says, nothing is pinned
    assert "EGL_DEVICE_ID" not in os.environ
    monkeypatch.setattr(Path, "exists", lambda self: True)
    pin_worker(0)
    assert os.environ["EGL_DEVICE_ID"] == "1"
    pin_worker(1)  # what is set stays: the user's own choice
    assert os.environ["EGL_DEVICE_ID"] == "1"
    monkeypatch.delenv("EGL_DEVICE_ID")
    pin_worker(1)
    assert os.environ["EGL_DEVICE_ID"] == "0"
    monkeypatch.delenv("EGL_DEVICE_ID")


def test_software_on_a_gpu_node_is_reported() -> None:
    assert "although there is a GPU" in software_on_gpu_node("pyrender", LLVMPIPE, True)
    assert "NVIDIA_DRIVER_CAPABILITIES" in software_on_gpu_node("pyrender", "SwiftShader", True)
    for renderer, device, has_gpu in (
        ("pyrender", LLVMPIPE, False),
        ("pyrender", "NVIDIA H200/PCIe/SSE2", True),
        ("embree", "CPU", True),
    ):
        assert software_on_gpu_node(renderer, device, has_gpu) == ""


def test_which_nodes_have_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found: list[str] = []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(found))
    assert not farm_gpu.node_has_gpu()
    found.append("nvidia0")
    assert farm_gpu.node_has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert not farm_gpu.node_has_gpu()
