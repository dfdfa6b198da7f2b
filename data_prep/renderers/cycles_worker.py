"""The other side of the cycles renderer: runs as a script in bpy's own environment.

bpy (Blender as a module) pins another NumPy and Python. So this file and what it imports need the
standard library, NumPy and bpy, and nothing else of this project. It answers messages on standard
input and output, and ends when its input does or when the process that started it is gone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.renderers.cycles_studio import Studio


def _stand_in_packages() -> None:
    """Make data_prep.renderers importable without running its __init__, which wants trimesh."""
    here = Path(__file__).resolve().parent
    for name, folder in (("data_prep", here.parent), ("data_prep.renderers", here)):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def _watch_parent(parent: int) -> None:
    """End with the parent, also in the middle of a picture: Blender lets go of the GIL there."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Serve requests until the input ends."""
    _watch_parent(int(sys.argv[1]))
    from data_prep.renderers.cycles_protocol import read_message, write_message

    # Blender writes to standard output as it likes: keep the messages' way apart
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    studio: Studio | None = None
    while True:
        try:
            request, arrays = read_message(requests)
        except EOFError:
            break
        answer: dict[str, Any] = {"ok": True}
        out: dict[str, Any] = {}
        try:
            if request["do"] == "start":
                import bpy
                import numpy as np

                from data_prep.renderers.cycles_studio import Studio

                studio = Studio(request["settings"])
                answer.update(
                    bpy=bpy.app.version_string,
                    numpy=np.__version__,
                    python=sys.version.split()[0],
                    device=studio.device,
                )
            elif studio is None:
                raise RuntimeError("not started")
            elif request["do"] == "load":
                studio.load(request, arrays)
            else:
                out = studio.render(request)
        except Exception as error:  # the parent shall say what went wrong
            reason = (str(error).strip().splitlines() or [""])[-1]
            answer = {"ok": False, "error": f"{type(error).__name__}: {reason}"}
        write_message(answers, answer, out)
    if studio is not None:
        studio.close()
    # Blender's own shutdown is slow and not always quiet
    os._exit(0)


if __name__ == "__main__":
    _stand_in_packages()
    main()
