"""Which prefixes recent matches went through most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from radix.tree import HotPrefix


def hottest(records: Iterable[int], parents: Mapping[int, int], limit: int) -> list[HotPrefix]:
    """See PrefixTree.hottest. `records` are the deepest blocks of matches, `parents` those of all held blocks."""
    hits = Counter(block for block in records if block in parents)
    depths: dict[int, int] = {}
    for block in hits:
        _add_depths(block, parents, depths)
    depths = {block: depth for block, depth in depths.items() if depth}
    for block in sorted(depths, key=depths.__getitem__, reverse=True):  # children before their parents
        if parents[block] in depths:
            hits[parents[block]] += hits[block]
    hidden = {parents[block] for block in depths if hits[parents[block]] == hits[block]}
    listed = [HotPrefix(block, depth, hits[block]) for block, depth in depths.items() if block not in hidden]
    listed.sort(key=lambda prefix: (-prefix.hits, -prefix.depth, prefix.block_hash))
    return listed[:limit]


def _add_depths(block: int, parents: Mapping[int, int], depths: dict[int, int]) -> None:
    """Give a held block and all held ones above it their depths; 0 to those whose way up ends in a circle."""
    path = []
    while block in parents and block not in depths:
        depths[block] = 0  # to come here again is to go in a circle
        path.append(block)
        block = parents[block]
    in_circle = block in parents and not depths[block]
    if in_circle:
        return
    depth = depths.get(block, 0)
    for below in reversed(path):
        depth += 1
        depths[below] = depth
