"""Keys and values in blocks of a fixed number of tokens, addressed through block tables."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from rhizome.errors import InvalidRequest
from worker.config import ModelConfig
from worker.transfer.memory import TAG_BYTES, BlockLayout, BlockMemory


class PagedKVCache:
    """For each layer keys and values of shape [num_blocks, block_size, num_kv_heads, head_dim], zero at first.

    A token's *slot* is block id * block_size + its offset in the block. Attention reads whole tiles and weighs what is
    masked with an exact 0, which a NaN or an infinity would survive: so values are finite, always, and what one
    request's broken numbers leave behind in a block cannot reach another.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory: BlockMemory | None = None,
    ) -> None:
        """`memory`: where the cache lies, all zero, instead of in memory of its own; see `transfer_memory`."""
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        self.memory = memory
        if memory is None:
            self._blocks = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self._blocks = torch.from_numpy(memory.pieces.reshape(-1)).view(dtype).view(shape)
        self.keys = [layer[0] for layer in self._blocks.unbind()]
        self.values = [layer[1] for layer in self._blocks.unbind()]
        self._key_slots = [keys.flatten(0, 1) for keys in self.keys]
        self._value_slots = [values.flatten(0, 1) for values in self.values]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values, each [tokens, num_kv_heads, head_dim], at `slots` [tokens] (int64)."""
        self._key_slots[layer].index_copy_(0, slots, keys)
        self._value_slots[layer].index_copy_(0, slots, values.nan_to_num())

    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block in every layer."""
        self._blocks[:, :, destination] = self._blocks[:, :, source]

    def slot_views(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as [slots, num_kv_heads, head_dim], sharing memory."""
        return self._key_slots[layer], self._value_slots[layer]


def transfer_memory(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, *, names: Sequence[object]
) -> BlockMemory:
    """Memory for a cache that other workers may read and that is filled from theirs; shared, where the system can.

    A block is as many pieces as there are layers, twice. `names`: what blocks must have in common besides their shape.
    """
    shape = (config.num_layers, block_size, config.num_kv_heads, config.head_dim, str(dtype))
    tag = blake2b(repr((shape, *names)).encode(), digest_size=TAG_BYTES).digest()
    layout = BlockLayout(block_bytes(config, block_size, dtype), 2 * config.num_layers, tag)
    try:
        return BlockMemory.shared(layout, num_blocks)
    except (AttributeError, OSError):  # no Linux, or no descriptors left
        return BlockMemory(torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8).numpy(), layout, num_blocks)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def blocks_within(budget_bytes: int, config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """How many blocks fit into a budget. Raises InvalidRequest when not even one does."""
    each = block_bytes(config, block_size, dtype)
    if budget_bytes < each:
        raise InvalidRequest("kv_cache_bytes", budget_bytes, f"one block of {block_size} tokens takes {each} bytes")
    return budget_bytes // each
