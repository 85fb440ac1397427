"""Attention over the paged cache: right against plain softmax, and the same bits however rows are laid out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rhizome.errors import InvalidRequest
from worker.attention import Span, slot_mapping
from worker.attention.cpu import TiledCpuAttention
from worker.config import ModelConfig
from worker.kv_cache.paged import PagedKVCache, block_bytes, blocks_within

torch.set_num_threads(1)
DIM = 16


class Sequences:
    """Random queries, keys and values of a few sequences, fed to attention in any split and layout."""

    def __init__(self, lengths: list[int], heads: int, kv_heads: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads = heads, kv_heads
        self.q = [torch.randn(n, heads, DIM, generator=generator) for n in lengths]
        self.k = [torch.randn(n, kv_heads, DIM, generator=generator) for n in lengths]
        self.v = [torch.randn(n, kv_heads, DIM, generator=generator) for n in lengths]

    def expected(self) -> list[Tensor]:
        """Plain causal attention in float64."""
        results = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            group = self.heads // self.kv_heads
            keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * DIM**-0.5
            hidden = torch.ones(len(q), len(q)).triu(1).bool()
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            results.append(torch.einsum("hqk,khd->qhd", weights, values).reshape(len(q), -1))
        return results

    def run(self, steps: list[list[tuple[int, int]]], block_size: int, tables: list[list[int]]) -> list[Tensor]:
        """Each step is a list of (sequence, rows to compute); returns each sequence's rows in order."""
        blocks = max(max(table) for table in tables) + 1
        cache = PagedKVCache(1, blocks, block_size, self.kv_heads, DIM)
        backend = TiledCpuAttention(cache, self.heads)
        done = [0] * len(self.q)
        results: list[list[Tensor]] = [[] for _ in self.q]
        for step in steps:
            parts = [(s, slice(done[s], done[s] + n)) for s, n in step]
            attend = backend.prepare([Span(p.start, p.stop - p.start, tables[s]) for s, p in parts])
            q, k, v = (torch.cat([x[s][p] for s, p in parts]) for x in (self.q, self.k, self.v))
            out = attend(0, q, k, v).split([n for _, n in step])
            for (s, n), rows in zip(step, out, strict=True):
                results[s].append(rows)
                done[s] += n
        return [torch.cat(rows) for rows in results]


def tables_for(lengths: list[int], block_size: int, *, scattered: bool, seed: int = 1) -> list[list[int]]:
    """Block tables without overlap: consecutive blocks, or blocks at random."""
    counts = [-(-n // block_size) for n in lengths]
    total = sum(counts) + 3
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist() if scattered else range(total)
    ids = iter(order)
    return [[next(ids) for _ in range(count)] for count in counts]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 1), (4, 4), (6, 2), (3, 1)])
def test_equals_plain_softmax_attention(heads: int, kv_heads: int) -> None:
    """Whatever the grouping of heads, results equal causal softmax attention."""
    lengths = [1, 7, 255, 256, 257, 600]
    sequences = Sequences(lengths, heads, kv_heads)
    got = sequences.run([list(enumerate(lengths))], 16, tables_for(lengths, 16, scattered=True))
    for result, wanted in zip(got, sequences.expected(), strict=True):
        torch.testing.assert_close(result.double(), wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (3, 1)])
def test_bits_do_not_depend_on_layout_or_batch(heads: int, kv_heads: int, threads: int) -> None:
    """Whole prompts, random chunks and single tokens; blocks of 1 to 256, consecutive or scattered: the same bits."""
    lengths = [530, 300, 20]
    sequences = Sequences(lengths, heads, kv_heads)
    whole = sequences.run([list(enumerate(lengths))], 256, tables_for(lengths, 256, scattered=False))
    torch.set_num_threads(threads)
    try:
        for block_size in (1, 8, 16, 32, 256):
            for scattered in (False, True):
                steps = random_steps(lengths, seed=block_size)
                got = sequences.run(steps, block_size, tables_for(lengths, block_size, scattered=scattered))
                for result, wanted in zip(got, whole, strict=True):
                    assert torch.equal(result, wanted)
    finally:
        torch.set_num_threads(1)


def random_steps(lengths: list[int], seed: int) -> list[list[tuple[int, int]]]:
    """Chunks of random sizes of random sequences, many of them single tokens."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    left = list(lengths)
    steps = []
    while any(left):
        step = []
        for sequence, rest in enumerate(left):
            if rest and below(4):
                count = min(rest, below(120) + 1 if below(2) else 1)
                step.append((sequence, count))
                left[sequence] -= count
        if step:
            steps.append(step)
    return steps


def test_rows_behind_the_spans_are_neither_written_nor_seen() -> None:
    """Padding rows give zeros and leave the cache alone."""
    cache = PagedKVCache(1, 4, 16, 2, DIM)
    attend = TiledCpuAttention(cache, 4).prepare([Span(0, 3, [2])])
    out = attend(0, torch.randn(8, 4, DIM), torch.ones(8, 2, DIM), torch.ones(8, 2, DIM))
    assert torch.equal(out[3:], torch.zeros(5, 4 * DIM))
    assert cache.keys[0].sum() == 3 * 2 * DIM
    assert cache.keys[0][2, :3].eq(1).all()


@pytest.mark.parametrize("block_size", [0, 3, 24, 512])
def test_block_sizes_that_do_not_divide_a_tile_are_refused(block_size: int) -> None:
    """The refusal names the value and the rule."""
    with pytest.raises(InvalidRequest, match=f"block_size is {block_size}: a divisor of 256"):
        TiledCpuAttention(PagedKVCache(1, 2, block_size, 1, 4), 1)


def test_a_cache_on_another_device_is_refused() -> None:
    """By name, before a step fails half-way."""
    with pytest.raises(InvalidRequest, match="device is 'meta': cpu"):
        TiledCpuAttention(PagedKVCache(1, 2, 16, 1, 4, device="meta"), 1)


def test_slots_follow_the_block_table() -> None:
    """A token's slot is its block's first slot plus its place in the block."""
    spans = [Span(3, 3, [7, 2]), Span(4, 1, [5, 9])]
    assert slot_mapping(spans, 4).tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 9 * 4]


def test_copied_blocks_are_equal_in_every_layer_and_apart_afterwards() -> None:
    """A copy takes keys and values of all layers; writing to one block leaves the other alone."""
    cache = PagedKVCache(2, 3, 2, 1, 4)
    for layer in range(2):
        cache.write(layer, torch.tensor([0, 1]), torch.randn(2, 1, 4), torch.randn(2, 1, 4))
    cache.copy_block(0, 2)
    for layer in range(2):
        assert torch.equal(cache.keys[layer][2], cache.keys[layer][0])
        assert torch.equal(cache.values[layer][2], cache.values[layer][0])
    cache.write(1, torch.tensor([4]), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    assert not torch.equal(cache.keys[1][2], cache.keys[1][0])
    assert torch.equal(cache.keys[0][2], cache.keys[0][0])


def test_blocks_within_a_budget() -> None:
    """Bytes of a block count keys and values of all layers; a budget below one block is refused."""
    config = ModelConfig.parse(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 64,
            "hidden_size": 256,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
        },
        {},
    )
    each = block_bytes(config, 16, torch.float32)
    assert each == 2 * 4 * 16 * 2 * 32 * 4
    assert blocks_within(10 * each + 1, config, 16, torch.float32) == 10
    with pytest.raises(InvalidRequest, match="kv_cache_bytes"):
        blocks_within(each - 1, config, 16, torch.float32)
