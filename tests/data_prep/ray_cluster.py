"""A real Ray cluster of two nodes, of which one is killed half-way; run as a script by the tests.

Its own process: Ray leaves threads and open files behind, which pytest would report as warnings.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

from data_prep.farm import FarmOptions, Limits, Task, run_tasks
from data_prep.farm_ray import RayEngine
from data_prep.render_many import render_many
from data_prep.render_object import RenderOptions
from data_prep.viewpoints import ViewpointOptions
from tests.data_prep.farm_tasks import act
from tests.data_prep.glb import points_only, tetra


def main(folder: Path) -> None:
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=node)
    other = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    engine = RayEngine(None, Limits(20.0, 2**29), None, gpus=False)
    slots = engine.slots()
    names = [f"o{i}" for i in range(12)]
    payload = {"do": "sleep", "seconds": 0.3, "log": str(folder / "log")}
    tasks = [Task(name, {**payload, "name": name}) for name in names]
    # faults on a cluster end like those on one machine
    tasks.insert(2, Task("bad", {"do": "segfault"}))
    tasks.insert(4, Task("refused", {"do": "refuse"}))
    results: dict[str, Any] = {}
    for result in run_tasks(act, tasks, engine, retries=1):
        fault = result.reply.fault
        where = (result.reply.value or {}).get("node")
        why = [fault.kind, fault.why] if fault else [None, None]
        results[result.task.id] = [*why, result.attempts, where]
        if len(results) == 6:
            cluster.remove_node(other, allow_graceful=False)
    engine.close()
    # the whole of it on the node that is left: meshes to views
    meshes = [tetra().write(folder, "a.glb"), points_only().write(folder, "b.glb")]
    options = RenderOptions(size=48, viewpoints=ViewpointOptions(count=3))
    farm = FarmOptions("ray", retries=0)
    summary = render_many(meshes, folder / "out", options, "embree", farm=farm)
    answer = {"results": results, "slots": slots, "summary": str(summary)}
    ray.shutdown()
    cluster.shutdown()
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
