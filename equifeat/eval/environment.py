"""What results were made with: versions, hardware, command line, commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from equifeat._version import __version__

_PACKAGES = ("torch", "timm", "numpy", "peft", "opencv-python-headless", "poselib")
_GIT_SECONDS = 10.0


def environment(
    command: Sequence[str] = (), device: str = "cpu", processes: int = 1
) -> dict[str, Any]:
    """Return what numbers may depend on beside the protocol, and what tells a run from another.

    Args:
        command: The command line as words.
        device: Device of the models.
        processes: How many processes shared the items.

    Returns:
        Plain values for JSON: versions, platform, cpu, cores, device, accelerators, processes,
        git (commit of equifeat's checkout, or None), command, date (UTC).
    """
    versions = {"equifeat": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "device": str(device),
        "accelerators": gpus,
        "processes": processes,
        "git": commit_of(Path(__file__).resolve().parents[2]),
        "command": shlex.join(command),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit_of(checkout: Path) -> str | None:
    """Return the commit of a git checkout.

    Args:
        checkout: Its top folder.

    Returns:
        40 hexadecimal digits, with "+changes" behind them when tracked files were altered; None
        when the folder is no checkout or git is not installed.
    """
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _git(checkout: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(checkout), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    """Name of the processor; Linux tells it in a file only."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
