"""Attention on the CPU: exact, in tiles of 256 cached positions, with the same bits however work is batched.

A row of a float32 GEMM has the same bits whatever other rows there are, as long as their number is a multiple of 4
(measured with MKL; tests hold it). So scores and weighted sums are computed for whole tiles at fixed positions, the
part past a query's position gets a weight of exactly 0, and the tiles' sums are added one after the other: tiles
behind a query's own position add zeros. Softmax is taken tile by tile and the tiles are weighed against each other
afterwards, as in FlashAttention (arXiv:2205.14135).

Of the exponentials in torch, softmax over rows and `exp` are used, since exp2, sigmoid and silu give other bits at
the ends of a thread's share of the work.

A tile whose blocks follow each other in the cache is read in place; others are gathered into a workspace of one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rhizome.errors import InvalidRequest
from worker.attention import AttentionStep, Span, slot_mapping
from worker.kv_cache.paged import PagedKVCache

TILE = 256  # positions
ROW_MULTIPLE = 4  # of every GEMM
MAX_SCORES = 2**20  # float32 scores alive at once: 4 MB, about a core's L2


class TiledCpuAttention:
    """Backend for a cache in main memory whose block size divides 256. Raises InvalidRequest for another."""

    def __init__(self, cache: PagedKVCache, num_heads: int) -> None:
        if cache.keys[0].device.type != "cpu":
            raise InvalidRequest("device", str(cache.keys[0].device), "cpu: there is no attention for others yet")
        if not 1 <= cache.block_size <= TILE or TILE % cache.block_size:
            raise InvalidRequest("block_size", cache.block_size, f"a divisor of {TILE}: attention works in such tiles")
        self.cache = cache
        self.num_heads = num_heads
        self.group_size = num_heads // cache.num_kv_heads
        self.scale = cache.head_dim**-0.5
        self.tile_blocks = TILE // cache.block_size
        # bmm wants keys as [heads, head_dim, positions] and values as [heads, positions, head_dim].
        self.keys = [cache.slot_views(layer)[0].permute(1, 2, 0) for layer in range(cache.num_layers)]
        self.values = [cache.slot_views(layer)[1].permute(1, 0, 2) for layer in range(cache.num_layers)]
        gathered = (self.tile_blocks, cache.block_size, cache.num_kv_heads, cache.head_dim)
        self._gathered = torch.zeros(gathered, dtype=cache.keys[0].dtype)
        self._gathered_keys = self._gathered.flatten(0, 1).permute(1, 2, 0)
        self._gathered_values = self._gathered.flatten(0, 1).permute(1, 0, 2)
        self._scores = torch.empty(0)

    def prepare(self, spans: Sequence[Span]) -> AttentionStep:
        """Split the rows into units of work of bounded size; decode rows share one."""
        works: list[_Work] = []
        decodes: list[_Item] = []
        row = 0
        for span in spans:
            tiles = self._tiles(span)
            if span.length == 1:
                decodes.append(_Item(row, span.start, 1, tiles))
            else:
                works += [self._work([item]) for item in self._query_tiles(row, span, tiles)]
            row += span.length
        decodes.sort(key=lambda item: len(item.tiles))
        works += [self._work(batch) for batch in self._batches(decodes)]
        return _Step(self, slot_mapping(spans, self.cache.block_size), works)

    def key_tile(self, layer: int, tile: int | Tensor) -> Tensor:
        """[num_kv_heads, head_dim, TILE]: a view of the cache, or of the workspace until the next tile is asked for."""
        if isinstance(tile, int):
            return self.keys[layer].narrow(2, tile, TILE)
        torch.index_select(self.cache.keys[layer], 0, tile, out=self._gathered)
        return self._gathered_keys

    def value_tile(self, layer: int, tile: int | Tensor) -> Tensor:
        """[num_kv_heads, TILE, head_dim], as `key_tile`."""
        if isinstance(tile, int):
            return self.values[layer].narrow(1, tile, TILE)
        torch.index_select(self.cache.values[layer], 0, tile, out=self._gathered)
        return self._gathered_values

    def _tiles(self, span: Span) -> list[int | Tensor]:
        """For each tile its first slot if its blocks are consecutive, else its block ids."""
        used = -(-(span.start + span.length) // self.cache.block_size)
        tiles: list[int | Tensor] = []
        for first in range(0, used, self.tile_blocks):
            blocks = span.block_ids[first : min(first + self.tile_blocks, used)]
            base = blocks[0]
            fits = base + self.tile_blocks <= self.cache.num_blocks
            if fits and all(block == base + n for n, block in enumerate(blocks)):
                tiles.append(base * self.cache.block_size)
            else:
                padded = [*blocks, *[base] * (self.tile_blocks - len(blocks))]  # what follows is masked
                tiles.append(torch.tensor(padded, dtype=torch.int64))
        return tiles

    def _query_tiles(self, row: int, span: Span, tiles: list[int | Tensor]) -> list[_Item]:
        items = []
        offset = 0
        while offset < span.length:
            start = span.start + offset
            reach = min(span.start + span.length, start + TILE)
            most = max(ROW_MULTIPLE, MAX_SCORES // (self.num_heads * TILE * _tiles_up_to(reach)))
            length = min(most, span.length - offset, TILE)
            items.append(_Item(row + offset, start, length, tiles[: _tiles_up_to(start + length)]))
            offset += length
        return items

    def _batches(self, items: list[_Item]) -> list[list[_Item]]:
        """Decode rows, sorted by tiles, in batches whose scores stay within bounds."""
        batches: list[list[_Item]] = []
        padded = _padded_rows(1, self.group_size) * self.num_heads * TILE
        for item in items:
            if batches and padded * len(item.tiles) * (len(batches[-1]) + 1) <= MAX_SCORES:
                batches[-1].append(item)
            else:
                batches.append([item])
        return batches

    def _work(self, items: list[_Item]) -> _Work:
        """Row numbers, masks and views of the workspace for items of equal length."""
        length, group = items[0].length, self.group_size
        padded = _padded_rows(length, group)
        steps = np.minimum(np.arange(padded), length - 1)
        rows = np.array([item.row for item in items])[:, None] + steps
        positions = np.array([item.start for item in items])[:, None] + steps
        tiles = max(len(item.tiles) for item in items)
        first_masked = (min(item.start for item in items) + 1) // TILE
        limits = np.repeat(positions, group, axis=1)[:, None, None, :, None]
        seen = np.arange(first_masked * TILE, tiles * TILE).reshape(tiles - first_masked, 1, 1, TILE)
        scores = self._scores_like((len(items), tiles, self.cache.num_kv_heads, padded * group, TILE))
        return _Work(
            rows=torch.from_numpy(rows.reshape(-1)),
            kept=torch.from_numpy(rows[:, :length].reshape(-1).copy()),
            length=length,
            padded=padded,
            scores=scores,
            masked=scores[:, first_masked:],
            mask=torch.from_numpy(seen > limits),
            tiles=[
                (b, scores[b, t], t == 0, tile) for b, item in enumerate(items) for t, tile in enumerate(item.tiles)
            ],
        )

    def _scores_like(self, shape: tuple[int, ...]) -> Tensor:
        """A view of the workspace that all units of work share, one after the other."""
        size = int(np.prod(shape))
        if self._scores.numel() < size:
            self._scores = torch.empty(size, dtype=self.cache.keys[0].dtype)
        return self._scores[:size].view(shape)


@dataclass(frozen=True, slots=True)
class _Item:
    """Consecutive rows of one sequence, and the tiles that they see."""

    row: int
    start: int
    length: int
    tiles: list[int | Tensor]


@dataclass(frozen=True, slots=True)
class _Work:
    """Items computed together: B items of `length` rows each, padded to `padded`, over T tiles.

    scores [B, T, num_kv_heads, padded * group, TILE]; `masked` is its part from the first tile on that any row sees
    only in part, and `mask` is true where a position lies behind the row's own. `tiles`: item, its scores, whether it
    is the item's first, and where the tile is.
    """

    rows: Tensor
    kept: Tensor
    length: int
    padded: int
    scores: Tensor
    masked: Tensor
    mask: Tensor
    tiles: list[tuple[int, Tensor, bool, int | Tensor]]


class _Step:
    def __init__(self, backend: TiledCpuAttention, slots: Tensor, works: list[_Work]) -> None:
        self._backend = backend
        self._slots = slots
        self._works = works

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        backend = self._backend
        count = len(self._slots)
        backend.cache.write(layer, self._slots, keys[:count], values[:count])
        queries = queries * backend.scale
        out = torch.zeros(len(queries), backend.num_heads * backend.cache.head_dim, dtype=queries.dtype)
        for work in self._works:
            out.index_copy_(0, work.kept, self._attend(layer, work, queries))
        return out

    def _attend(self, layer: int, work: _Work, queries: Tensor) -> Tensor:
        """[B * length, num_heads * head_dim] for the rows of one unit of work."""
        backend = self._backend
        heads, group, dim = backend.cache.num_kv_heads, backend.group_size, backend.cache.head_dim
        batch, padded = len(work.scores), work.padded
        # Queries of one KV head side by side: [B, heads, padded * group, dim].
        grouped = queries.index_select(0, work.rows).view(batch, padded, heads, group, dim).transpose(1, 2)
        by_item = grouped.reshape(batch, heads, padded * group, dim).unbind()
        for item, scores, _, tile in work.tiles:
            torch.bmm(by_item[item], backend.key_tile(layer, tile), out=scores)
        work.masked.masked_fill_(work.mask, torch.finfo(work.scores.dtype).min)
        _softmax_(work.scores)
        summed = queries.new_empty(batch, heads, padded * group, dim)
        sum_of = summed.unbind()
        for item, weights, first, tile in work.tiles:
            if first:
                torch.bmm(weights, backend.value_tile(layer, tile), out=sum_of[item])
            else:
                sum_of[item].baddbmm_(weights, backend.value_tile(layer, tile))
        by_row = summed.view(batch, heads, padded, group, dim).transpose(1, 2)[:, : work.length]
        return by_row.reshape(batch * work.length, heads * group * dim)


def _softmax_(scores: Tensor) -> None:
    """Softmax over tiles (dim 1) and positions (last dim), in place.

    A tile's sum of exponentials is the inverse of its largest weight. The sum over tiles runs in order (cumsum), so
    that tiles of which nothing is seen, and which count for exactly 0, leave it alone.
    """
    if scores.shape[1] == 1:
        torch.softmax(scores, -1, out=scores)
        return
    highest = scores.amax(-1, keepdim=True)
    torch.softmax(scores, -1, out=scores)
    share = (highest - highest.amax(1, keepdim=True)).exp_().div_(scores.amax(-1, keepdim=True))
    scores.mul_(share.div_(share.cumsum(1)[:, -1:]))


def _tiles_up_to(position: int) -> int:
    return -(-position // TILE)


def _padded_rows(rows: int, group_size: int) -> int:
    """The least number >= rows whose product with the group size is a multiple of 4."""
    while rows * group_size % ROW_MULTIPLE:
        rows += 1
    return rows
