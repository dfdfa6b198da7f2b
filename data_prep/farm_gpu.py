"""Which GPU a worker draws on, and whether a node with a GPU draws in software all the same.

EGL counts the machine's devices whatever CUDA_VISIBLE_DEVICES says, so the number that CUDA calls 0
is not EGL's device 0: the two are matched by the CUDA number that each EGL device tells.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_EGL_CUDA_DEVICE_NV = 0x323A
_MAX_DEVICES = 64
# Mesa's rasterisers on the CPU, and Google's.
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "swiftshader", "software rasterizer")


def choose_device(
    index: int, egl_cuda_ids: Sequence[int | None], visible: Sequence[int] | None
) -> int | None:
    """Choose the EGL device of a worker.

    Args:
        index: Number of the worker on its node; workers take turns on the GPUs.
        egl_cuda_ids: The CUDA number of each EGL device, None for one that has none (the CPU).
        visible: CUDA numbers that may be used, in order; None = all.

    Returns:
        An index into ``egl_cuda_ids``, None when there is no such GPU.
    """
    by_cuda = {cuda: egl for egl, cuda in enumerate(egl_cuda_ids) if cuda is not None}
    order = sorted(by_cuda) if visible is None else [cuda for cuda in visible if cuda in by_cuda]
    return by_cuda[order[index % len(order)]] if order else None


def visible_cuda_ids(environment: Mapping[str, str], uuids: Sequence[str] = ()) -> list[int] | None:
    """Read CUDA_VISIBLE_DEVICES.

    Args:
        environment: Environment variables.
        uuids: UUID of each GPU by its number, for lists like GPU-1f2e….

    Returns:
        The numbers of the GPUs that may be used; None when all may. Like CUDA, it stops at the
        first entry that is no GPU.
    """
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    found = []
    for entry in (part.strip() for part in text.split(",")):
        if entry.isdigit():
            found.append(int(entry))
            continue
        named = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(named) != 1:
            break
        found += named
    return found


def egl_cuda_ids() -> list[int | None]:
    """Ask EGL for its devices, without opening one.

    Returns:
        The CUDA number of each EGL device, None for one without; empty without EGL.
    """
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return []
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query_devices = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    query_attribute = egl.eglGetProcAddress(b"eglQueryDeviceAttribEXT")
    if not query_devices or not query_attribute:
        return []
    devices = (ctypes.c_void_p * _MAX_DEVICES)()
    count = ctypes.c_int()
    of_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    if not of_devices(query_devices)(_MAX_DEVICES, devices, ctypes.byref(count)):
        return []
    of_attribute = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    ids: list[int | None] = []
    for device in devices[: count.value]:
        value = ctypes.c_ssize_t(-1)
        ok = of_attribute(query_attribute)(device, _EGL_CUDA_DEVICE_NV, ctypes.byref(value))
        ids.append(value.value if ok and value.value >= 0 else None)
    return ids


def pin_worker(index: int) -> None:
    """Give this process a GPU by EGL_DEVICE_ID, unless that is set or there is none.

    Args:
        index: Number of the worker on its node.
    """
    if "EGL_DEVICE_ID" in os.environ or not Path("/dev/nvidiactl").exists():
        return
    text = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    uuids = _gpu_uuids() if text and not text.replace(",", "").replace(" ", "").isdigit() else []
    device = choose_device(index, egl_cuda_ids(), visible_cuda_ids(os.environ, uuids))
    if device is not None:
        os.environ["EGL_DEVICE_ID"] = str(device)


def software_on_gpu_node(renderer: str, device: str, has_gpu: bool) -> str:
    """Tell whether a node draws in software although it has a GPU.

    Args:
        renderer: Name of the renderer.
        device: GL_RENDERER, or what the renderer calls its device.
        has_gpu: Whether there is a GPU.

    Returns:
        A clause, empty when all is as it should be.
    """
    if not (has_gpu and renderer == "pyrender" and is_software(device)):
        return ""
    return (
        f"OpenGL draws in software ({device}) although there is a GPU; give the container the "
        "graphics capability of the driver (NVIDIA_DRIVER_CAPABILITIES=all)"
    )


def is_software(device: str) -> bool:
    """Tell whether GL_RENDERER names a rasteriser on the CPU.

    Args:
        device: GL_RENDERER.

    Returns:
        True for llvmpipe and its like.
    """
    return any(name in device.lower() for name in _SOFTWARE)


def node_has_gpu() -> bool:
    """Tell whether this machine has a GPU that could draw and that is not hidden from us."""
    if visible_cuda_ids(os.environ, ["GPU", "MIG"]) == []:
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/dev/dri").glob("renderD*"))


def _gpu_uuids() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()
