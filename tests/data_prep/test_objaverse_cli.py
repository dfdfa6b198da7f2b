"""`equifeat objaverse` as a user runs it: real processes, real signals, real environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.data_prep.hub_server import FakeHub, objaverse_files, uid_of
from tests.data_prep.test_objaverse import rows, served, tree
from tests.helpers import ROOT


def start(hub: FakeHub, tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "equifeat.cli", "objaverse", "--out", str(tmp_path / "out")]
    return subprocess.Popen(
        [*command, *options],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite that a shell started in the background ignores SIGINT, and so would the child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_glbs(process: subprocess.Popen[str], out: Path, count: int) -> None:
    while len(list(out.glob("glbs/*/*.glb"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_killed_half_way_then_the_same_command(tmp_path: Path) -> None:
    hub = FakeHub(objaverse_files(60), share=0.1, seed=5)
    with hub.serve():
        hub.pause = 0.2
        first = start(hub, tmp_path, "--random", "60")
        wait_for_glbs(first, tmp_path / "out", 15)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        first.communicate()
        before = len(tree(tmp_path / "out"))
        assert 15 <= before < 60
        assert len(rows(tmp_path / "out")) <= before

        hub.pause = 0.0
        second = start(hub, tmp_path, "--random", "60", "--metadata")
        said, complained = second.communicate()
        assert second.returncode == 0, complained
        assert "0 failed" in said
        assert "licences: 30 × by" in said
        assert "downloading: " in complained
        # huggingface_hub's own bars and retries are not shown
        assert "it/s" not in complained
        assert "Retry" not in complained
        out = tmp_path / "out"
        assert tree(out) == served(hub, range(60)), "not what an unbroken run gives"
        records = rows(out)
        assert set(records) == {uid_of(i) for i in range(60)}
        assert all(row.status == "ok" for row in records.values())
        assert {p.name for p in out.iterdir()} == {
            "glbs",
            "manifest.sqlite",
            "manifest.sqlite.lock",
        }


def test_ctrl_c_does_not_wait_for_a_hub_that_hangs(tmp_path: Path) -> None:
    hub = FakeHub(objaverse_files(20))
    with hub.serve():
        process = start(hub, tmp_path, "--random", "20")
        hub.pause = 60.0
        while not hub.glb_requests():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        time.sleep(0.3)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, complained = process.communicate()
        assert time.monotonic() - asked < 20  # most of it Python's own end on a busy machine
        assert process.returncode == 130
        assert complained.strip().endswith("equifeat: interrupted")
        assert not (tmp_path / "out" / ".download").exists()
