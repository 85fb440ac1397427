"""Who holds what: one prefix tree over the fleet, and for each worker the view that keeps its part in step."""

from __future__ import annotations

from heapq import heappop, heappush

from kv_events.view import WorkerView
from radix import make_tree
from radix.keys import Hashes
from radix.tree import DEFAULT_MAX_BLOCKS, DEFAULT_MAX_BLOCKS_PER_WORKER
from router.table import Floats


class Index:
    """Views by worker id. The tree knows workers as small numbers; those of dropped workers are used again."""

    def __init__(
        self, max_blocks: int = DEFAULT_MAX_BLOCKS, max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER
    ) -> None:
        """The caps of the tree: (worker, block) entries in all and of one worker. ValueError out of range."""
        self.tree = make_tree(max_blocks, max_blocks_per_worker)
        self._views: dict[str, WorkerView] = {}
        self._names: dict[int, str] = {}
        self._free: list[int] = []
        self.slot_names: list[str] = []  # worker ids by slot; empty for a slot that nobody has

    def add(self, worker_id: str) -> WorkerView:
        """An empty view for a worker that has none."""
        assert worker_id not in self._views
        number = heappop(self._free) if self._free else len(self._names)
        self._names[number] = worker_id
        if number == len(self.slot_names):
            self.slot_names.append("")
        self.slot_names[number] = worker_id
        self._views[worker_id] = WorkerView(worker_id, number, self.tree)
        return self._views[worker_id]

    def drop(self, worker_id: str) -> None:
        """Forget the worker and its blocks. Its view must not be fed any more."""
        view = self._views.pop(worker_id, None)
        if view is not None:
            view.forget()
            del self._names[view.worker_index]
            self.slot_names[view.worker_index] = ""
            heappush(self._free, view.worker_index)

    def view(self, worker_id: str) -> WorkerView:
        """The view of a worker that was added."""
        return self._views[worker_id]

    def names(self) -> list[str]:
        """Worker ids by their number in the tree; empty for a number that nobody has."""
        return [self._names.get(number, "") for number in range(len(self._names) + len(self._free))]

    def at_cap(self) -> dict[str, int]:
        """Workers whose views a cap cut short -> how many entries were refused."""
        return {name: self.tree.refused(view.worker_index) for name, view in self._views.items() if view.truncated}

    def match(self, hashes: Hashes) -> Floats:
        """Leading blocks of a prompt that each slot holds: shape (2, slots), on the device, and in any tier."""
        return self.tree.match(hashes).by_worker(len(self.slot_names))

    def slot(self, worker_id: str) -> int:
        """The tree's number of a worker that was added."""
        return self._views[worker_id].worker_index

    def check(self, worker_ids: list[str]) -> None:
        """Assert the invariants: a view for each worker, and no entry of anybody else."""
        assert sorted(self._views) == sorted(worker_ids) == sorted(self._names.values())
        assert sorted([*self._names, *self._free]) == list(range(len(self._names) + len(self._free)))
        self.tree.check()
        assert len(self.tree) == sum(self.tree.count(view.worker_index) for view in self._views.values())
