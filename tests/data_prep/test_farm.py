from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep.farm import (
    Engine,
    FarmOptions,
    HereEngine,
    Limits,
    Result,
    Task,
    call_once,
    open_engine,
    run_tasks,
)
from data_prep.farm_local import LocalEngine
from data_prep.farm_worker import GIB, fault_of
from equifeat.errors import MeshError, RenderError
from tests.data_prep.farm_tasks import act
from tests.helpers import ROOT

Tasks = list[tuple[str, dict[str, Any]]]


def run(engine: Engine, tasks: Tasks, retries: int = 0) -> dict[str, Result]:
    todo = [Task(name, {**payload, "name": name}) for name, payload in tasks]
    results = list(run_tasks(act, todo, engine, retries))
    assert sorted(r.task.id for r in results) == sorted(name for name, _ in tasks)
    return {r.task.id: r for r in results}


def kind(result: Result) -> str:
    return "" if result.reply.fault is None else result.reply.fault.kind


def why(result: Result) -> str:
    return "" if result.reply.fault is None else result.reply.fault.why


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine(2, Limits(2.0, GIB // 4))
    yield made
    made.close()


def test_every_fault_costs_one_object(engine: LocalEngine, tmp_path: Path) -> None:
    """Real faults between objects that are fine, in one pool of two workers."""
    log = str(tmp_path / "log")
    mapped = tmp_path / "mapped"
    with mapped.open("wb") as file:
        file.truncate(300 * 2**20)
    bad = {
        "segfault": "crash",
        "sleep": "time limit",
        "hang_with_child": "time limit",
        "gobble": "memory limit",
        "gobble_at_once": "memory limit",
        "context_lost": "context lost",
        "odd": "unexpected",
        "leave": "unexpected",
        "refuse": "refused",
        "blank": "wrong picture",
    }
    tasks: Tasks = [("reserve", {"do": "reserve", "file": str(mapped)})]
    for name in bad:
        tasks.append((name, {"do": name, "log": log, "children": str(tmp_path / "children")}))
        tasks.append((f"after {name}", {"do": "fine", "log": log}))
    results = run(engine, tasks, retries=1)
    assert {name: kind(results[name]) for name in bad} == bad
    for name, result in results.items():
        if name not in bad:
            assert result.reply.fault is None, (name, why(result))
            assert result.attempts == 1
        else:
            # a refusal is final, everything else gets its second try
            assert result.attempts == (1 if name == "refuse" else 2), name
    lines = Path(log).read_text().splitlines()
    tried = collections.Counter(line.rsplit(" ", 1)[0] for line in lines)
    assert {name: tried[name] for name in bad} == {n: 1 if n == "refuse" else 2 for n in bad}
    assert "SIGSEGV" in why(results["segfault"])
    assert "not done after 2 s (--time_limit)" in why(results["sleep"])
    assert "memory limit of 0.25 GiB" in why(results["gobble"])
    assert results["gobble"].reply.peak > GIB // 4
    assert "memory limit of 0.25 GiB" in why(results["gobble_at_once"])
    assert "unexpected ZeroDivisionError: by nothing" in why(results["odd"])
    # more was mapped and read than is allowed: mapped memory is not the worker's own
    assert results["reserve"].reply.peak < GIB // 5
    children = [int(line) for line in (tmp_path / "children").read_text().split()]
    assert len(children) == 2
    wait_until(lambda: not any(map(psutil.pid_exists, children)))


def test_a_lost_context_gets_a_fresh_process(engine: LocalEngine, tmp_path: Path) -> None:
    tasks: Tasks = [("a", {"do": "lost_until_fresh", "first": str(tmp_path / "first")})]
    result = run(engine, tasks, retries=1)["a"]
    assert result.reply.fault is None
    assert result.attempts == 2


def test_workers_are_reused_and_single_threaded() -> None:
    engine = LocalEngine(1, Limits(None, None))
    try:
        results = run(engine, [(str(i), {"do": "fine"}) for i in range(4)])
        # a refusal leaves the worker as it is
        refused = run(engine, [("r", {"do": "refuse"})])["r"]
        later = run(engine, [("later", {"do": "fine"})])["later"]
    finally:
        engine.close()
    assert kind(refused) == "refused"
    values = [r.reply.value or {} for r in [*results.values(), later]]
    assert len({v["pid"] for v in values}) == 1
    assert values[0]["pid"] != os.getpid()
    assert {v["threads"] for v in values} == {"1"}
    wait_until(lambda: not psutil.pid_exists(values[0]["pid"]))


def test_a_dead_idle_worker_costs_nothing(engine: LocalEngine) -> None:
    one = LocalEngine(1, Limits(None, None))
    try:
        pid = (run(one, [("a", {"do": "fine"})])["a"].reply.value or {})["pid"]
        os.kill(pid, 9)
        wait_until(lambda: not psutil.pid_exists(pid))
        result = run(one, [("b", {"do": "fine"})], retries=1)["b"]
        assert result.reply.fault is None, why(result)
    finally:
        one.close()


def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    todo = [Task(str(i), {"do": "full"}) for i in range(3)]
    with pytest.raises(RenderError, match=r"0: .*No space left.*run the same command again"):
        list(run_tasks(act, todo, HereEngine()))


def test_tasks_are_drawn_as_workers_become_free() -> None:
    """A million objects must not be handed over at once."""
    drawn = 0

    def tasks() -> Iterator[Task]:
        nonlocal drawn
        for i in range(50):
            drawn += 1
            yield Task(str(i), {"do": "fine"})

    for done, _ in enumerate(run_tasks(act, tasks(), HereEngine()), 1):
        assert drawn <= done + 1


def test_here_engine_keeps_the_rules_of_retries(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = run(
        HereEngine(),
        [(n, {"do": n, "log": str(log)}) for n in ("refuse", "blank", "odd", "fine")],
        retries=2,
    )
    attempts = {name: r.attempts for name, r in results.items()}
    assert attempts == {"refuse": 1, "blank": 3, "odd": 3, "fine": 1}
    assert len(log.read_text().splitlines()) == 8


def test_call_once_raises_what_went_wrong() -> None:
    assert call_once(act, {"do": "fine"}, HereEngine())["pid"] == os.getpid()
    with pytest.raises(RenderError, match="the picture shows 0%"):
        call_once(act, {"do": "blank"}, HereEngine())


def test_faults_are_found_below_other_errors() -> None:
    """mesh.py turns whatever a reader raises into a MeshError."""
    error = MeshError("a.glb: trimesh cannot read it")
    error.__cause__ = MemoryError("Unable to allocate 3 TiB")
    assert fault_of(error).kind == "memory limit"
    assert fault_of(MeshError("a.glb: broken")).kind == "refused"


def test_workers_do_not_outlive_a_killed_driver(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from data_prep.farm import *\n"
        "from tests.data_prep.farm_tasks import act\n"
        "if __name__ == '__main__':\n"
        "    engine = open_engine(FarmOptions('local', 2))\n"
        "    tasks = [Task(n, {'do': n, 'log': sys.argv[1], 'children': sys.argv[2]})"
        " for n in ('sleep', 'hang_with_child')]\n"
        "    list(run_tasks(act, tasks, engine))\n"
    )
    script = tmp_path / "driver.py"
    script.write_text(code)
    log, children = tmp_path / "log", tmp_path / "children"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, script, log, children], env=environment)
    wait_until(lambda: children.exists() and len(log.read_text().splitlines()) == 2)
    workers = [int(line.split()[-1]) for line in log.read_text().splitlines()]
    assert all(map(psutil.pid_exists, workers))
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(map(alive, workers)))


def alive(pid: int) -> bool:
    """A killed orphan may wait for init to bury it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": 0}, "workers = 0"),
        ({"time_limit": -1.0}, "time_limit = -1.0"),
        ({"memory_limit": 0.1}, r"memory_limit = 0\.1"),
        ({"retries": -1}, "retries = -1"),
        ({"engine": "local", "address": "auto"}, "needs --engine ray"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RenderError, match=sentence):
        FarmOptions(**options)


def test_a_node_killed_half_way_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = Path(__file__).with_name("ray_cluster.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    results = answer["results"]
    assert len(results) == 14
    assert answer["slots"] == 2
    bad, refused = results.pop("bad"), results.pop("refused")
    assert bad[0] == "crash"
    assert "SIGSEGV" in bad[1]
    assert bad[2] == 2
    assert refused[0] == "refused"
    assert refused[2] == 1
    assert all(fault is None for fault, *_ in results.values()), results
    assert "1 rendered, 0 skipped, 1 failed with embree" in answer["summary"]
    assert len(list((tmp_path / "out" / "a").glob("color_*.png"))) == 3
    # both nodes worked, and at the end only the one that was left
    by_node = [node for *_, node in results.values()]
    assert len(set(by_node)) == 2
    assert len(set(by_node[-4:])) == 1


def test_engines_by_name() -> None:
    assert isinstance(open_engine(FarmOptions()), HereEngine)
    engine = open_engine(FarmOptions("local", 3))
    assert engine.slots() == 3
    engine.close()
