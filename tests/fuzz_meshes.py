"""A long run of hostile mesh files through load_mesh, in child processes that may crash.

    python -m tests.fuzz_meshes --minutes 10 [--seed 0] [--keep FOLDER]

Each case must end in a finite mesh or in a MeshError of one line that names the file; within time
and memory; without a file opened outside its folder, a process started or a socket. All else is
printed and its file kept. Exit status 1 if there was any.
tests/data_prep/test_fuzz_meshes.py runs a short part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.mesh import Mesh, MeshLimits, load_mesh
from equifeat.errors import MeshError
from tests.data_prep.mutate import mutate
from tests.data_prep.seeds import make_folder, seed_files

# Small, so that what a file asks for is either small or refused.
LIMITS = MeshLimits(
    max_triangles=100_000, max_texture_pixels=2**22, max_file_bytes=2**25, max_nodes=5_000
)
SECONDS = 20
EXTRA_MEMORY = 1_500_000_000
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.posix_spawn",
    "os.system",
    "os.fork",
    "ctypes.dlopen",
)


class Watch:
    """An audit hook that notes what a load touches outside its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(args[0], str | bytes):
            name = args[0] if isinstance(args[0], str) else args[0].decode(errors="replace")
            target = Path(name).resolve()
            code = target.suffix in (".py", ".pyc", ".so") or ".so." in target.name
            if self.folder not in target.parents and not code:
                self.seen.append(f"open {name}")
        elif event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {args!r:.100}")


def check(path: Path, limits: MeshLimits = LIMITS) -> str:
    """Load one file; return what is wrong with how it went, or an empty string."""
    try:
        mesh = load_mesh(path, limits)
    except MeshError as error:
        message = str(error)
        if "needs more memory" in message:
            return "memory"
        return "" if str(path) in message and message.isprintable() else f"message {message!r}"
    return unfit(mesh)


def unfit(mesh: Mesh) -> str:
    """Return what a renderer could not draw, or an empty string."""
    for part in mesh.primitives:
        count = len(part.vertices)
        tables = (part.vertices, part.normals, part.uv, part.vertex_colors)
        if any(t is not None and (len(t) != count or not np.isfinite(t).all()) for t in tables):
            return "a table that is not finite or of another length"
        if part.faces.min() < 0 or part.faces.max() >= count or part.faces.shape[1] != 3:
            return "faces out of range"
        if not all(0.0 <= x <= 1.0 for x in part.base_color):
            return f"colour {part.base_color}"
    used = np.concatenate([p.vertices[p.faces.reshape(-1)] for p in mesh.primitives])
    longest = float((used.max(axis=0) - used.min(axis=0)).max())
    return "" if abs(longest - 1.0) < 1e-3 else f"longest side {longest}"


def _child(folder: Path, seed: int, start: int, seconds: float, cases: int, pipe: Any) -> None:
    """Try cases one after another; what is told before a case is how a crash is attributed."""
    faulthandler.enable()
    warnings.simplefilter("error")
    small, real = seed_files()
    seeds, watch = small + real, Watch(folder)
    for suffix, data in seeds:  # imports are done before memory is bounded
        (folder / f"warm{suffix}").write_bytes(data)
        with contextlib.suppress(MeshError):
            load_mesh(folder / f"warm{suffix}", LIMITS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end, number = time.monotonic() + seconds, start
    while time.monotonic() < end and number < start + cases:
        rng = random.Random(f"{seed} {number}")
        # real meshes have long headers and take ten times as long
        suffix, data = rng.choice(real if real and rng.random() < 0.2 else small)
        path = folder / f"case{suffix}"
        path.write_bytes(mutate(suffix, data, rng))
        pipe.send((number, suffix, None))
        signal.alarm(SECONDS)
        watch.active = True
        try:
            wrong = check(path)
        except Exception:  # anything but MeshError is a finding
            wrong = traceback.format_exc()
        watch.active = False
        signal.alarm(0)
        if watch.seen:
            wrong = f"{wrong} touched {watch.seen}"
            watch.seen.clear()
        if wrong:
            pipe.send((number, suffix, wrong))
        number += 1
    pipe.send((number, "", None))


def run(minutes: float, seed: int, keep: Path | None, cases: int = 10**9) -> tuple[int, list[str]]:
    """Run cases until the time is over.

    Args:
        minutes: How long.
        seed: Case i depends on (seed, i).
        keep: Where files of findings go.
        cases: Stop after so many.

    Returns:
        Number of cases, and one text a finding.
    """
    end, number, findings = time.monotonic() + 60 * minutes, 0, list[str]()
    spawn = multiprocessing.get_context("spawn")
    while time.monotonic() < end and number < cases:
        with tempfile.TemporaryDirectory() as parent:
            folder = make_folder(Path(parent))
            mine, theirs = spawn.Pipe(duplex=False)
            left = end - time.monotonic()
            child = spawn.Process(
                target=_child, args=(folder, seed, number, left, cases - number, theirs)
            )
            child.start()
            theirs.close()
            last: tuple[int, str] = (number, "")
            found: list[tuple[int, str, str]] = []
            try:
                while True:
                    at, suffix, wrong = mine.recv()
                    last = (at, suffix)
                    if wrong:
                        found.append((at, suffix, wrong))
                        if keep is not None:
                            keep.mkdir(parents=True, exist_ok=True)
            except EOFError:
                child.join()
            if child.exitcode:
                found.append((*last, f"the process ended with {child.exitcode}"))
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / f"case{last[1]}", keep / f"crash_{last[0]}{last[1]}")
            findings += [f"case {seed}/{at}{suffix}: {wrong}" for at, suffix, wrong in found]
            number = last[0] + (1 if child.exitcode else 0)
    return number, findings


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    number, findings = run(given.minutes, given.seed, given.keep, given.cases)
    for text in findings:
        sys.stdout.write(f"{text}\n")
    sys.stdout.write(f"{number} cases, {len(findings)} findings\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
