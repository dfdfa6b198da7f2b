"""What workers are given to do in the tests of the farm; they import this module by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from equifeat.errors import MeshError, RenderError

MIB = 2**20


def act(payload: dict[str, Any]) -> dict[str, Any]:
    """Note that it was called, then do what the payload says."""
    if "log" in payload:
        with Path(payload["log"]).open("a") as file:
            file.write(f"{payload.get('name', '')} {os.getpid()}\n")
    result = ACTIONS[payload["do"]](payload)
    # Ray's own name for the node: a parent's number changes when a killed node leaves orphans
    return {"pid": os.getpid(), "node": os.environ.get("RAY_RAYLET_PID"), **(result or {})}


def fine(payload: dict[str, Any]) -> dict[str, Any]:
    return {"threads": os.environ.get("LP_NUM_THREADS"), "egl": os.environ.get("EGL_DEVICE_ID")}


def segfault(payload: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def sleep(payload: dict[str, Any]) -> None:
    time.sleep(payload.get("seconds", 3600))


def hang_with_child(payload: dict[str, Any]) -> None:
    """Hang, and have a child that would live on."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with Path(payload["children"]).open("a") as file:
        file.write(f"{child.pid}\n")
    time.sleep(3600)


def gobble(payload: dict[str, Any]) -> None:
    """Take memory bit by bit, and touch it."""
    taken = []
    while True:
        taken.append(bytearray(os.urandom(MIB)) * 16)


def gobble_at_once(payload: dict[str, Any]) -> None:
    bytearray(2**40)


def reserve(payload: dict[str, Any]) -> dict[str, Any]:
    """Map a large file, as a driver maps a GPU: that is no memory of ours."""
    import mmap

    with Path(payload["file"]).open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        total = len(mapped[::4096])
    time.sleep(0.3)
    return {"total": total}


def context_lost(payload: dict[str, Any]) -> None:
    raise RuntimeError("GLError(err = 1287, description = b'context lost')")


def lost_until_fresh(payload: dict[str, Any]) -> None:
    """Fail in every process but the second: its state is bad, not the object."""
    first = Path(payload["first"])
    if not first.exists():
        first.write_text(str(os.getpid()))
    if first.read_text() == str(os.getpid()):
        context_lost(payload)


def odd(payload: dict[str, Any]) -> None:
    raise ZeroDivisionError("by nothing")


def leave(payload: dict[str, Any]) -> None:
    sys.exit(3)


def refuse(payload: dict[str, Any]) -> None:
    raise MeshError("thing.glb: it holds points or lines only")


def blank(payload: dict[str, Any]) -> None:
    raise RenderError("view 2: the picture shows 0%")


def full(payload: dict[str, Any]) -> None:
    raise OSError(28, "No space left on device", "/out/color_000000.png")


ACTIONS = {
    f.__name__: f
    for f in (
        *(fine, segfault, sleep, hang_with_child, gobble, gobble_at_once, reserve, context_lost),
        *(lost_until_fresh, odd, leave, refuse, blank, full),
    )
}


def hostile_job(job: Any) -> dict[str, Any]:
    """Render, unless the object is named after an action above."""
    if job.id in ACTIONS:
        return act({"do": job.id})
    from data_prep.farm_render import render_job

    return render_job(job)
