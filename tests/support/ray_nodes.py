"""A Ray cluster of several nodes on this machine, for tests."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

STARTS = 3  # Ray gives a node 30 s to start, and a busy machine may need longer
NODE = {"num_cpus": 4, "object_store_memory": 80 * 2**20, "include_dashboard": False}
# A dead node is noticed after 3 s, not 30.
SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


class RayNodes:
    """A head, which has the resource `front`, and nodes that have one `place` each; this process is a driver."""

    def __init__(self, nodes: int) -> None:
        """Raises what Ray raises when it does not start."""
        import ray
        from ray.cluster_utils import Cluster

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self.cluster: Any = None
        try:
            head = {**NODE, "resources": {"front": 8}, "_system_config": SYSTEM}
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
            self.nodes: list[Any] = []
            for _ in range(nodes):
                self.add()
            self.cluster.wait_for_nodes()
            ray.init(address=self.cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """host:port of the cluster."""
        return str(self.cluster.address)

    def add(self) -> None:
        """One more node. Ray wants the main thread for it."""
        self.nodes.append(self.cluster.add_node(**NODE, resources={"place": 1}, wait=False))

    def lose(self, node_id: str) -> None:
        """Kill a node with all that runs on it, as when its power fails."""
        (lost,) = [node for node in self.nodes if node.node_id == node_id]
        self.nodes.remove(lost)
        self.cluster.remove_node(lost, allow_graceful=False)

    def logs(self) -> Iterator[str]:
        """Everything that Ray and the actors have written down."""
        folder = os.path.join(self.cluster.head_node.get_session_dir_path(), "logs")
        for place, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError), open(os.path.join(place, name), errors="replace") as file:
                    yield file.read()

    def close(self) -> None:
        """End all of it."""
        import ray

        ray.shutdown()
        if self.cluster is not None:
            self.cluster.shutdown()


def started(nodes: int) -> RayNodes:
    """A cluster, after some tries where the machine is busy."""
    for left in reversed(range(STARTS)):
        try:
            return RayNodes(nodes)
        except Exception:
            if not left:
                raise
            time.sleep(2)
    raise AssertionError("unreachable")
