"""The index: block keys, and the tree of who holds them. Pure: no wire, no clock, no I/O."""

from __future__ import annotations

from radix.backend import BACKEND, BACKEND_REASON, native
from radix.reference import ReferenceTree
from radix.tree import DEFAULT_MAX_BLOCKS, DEFAULT_MAX_BLOCKS_PER_WORKER, PrefixTree

__all__ = ["BACKEND", "BACKEND_REASON", "make_tree"]


def make_tree(
    max_blocks: int = DEFAULT_MAX_BLOCKS, max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER
) -> PrefixTree:
    """An empty tree of the backend that runs, with these caps on (worker, block) entries: ValueError out of range."""
    if native is not None:
        tree: PrefixTree = native.NativeTree(max_blocks, max_blocks_per_worker)
        return tree
    return ReferenceTree(max_blocks, max_blocks_per_worker)
