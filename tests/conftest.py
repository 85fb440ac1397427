"""Shared by all tests: one tiny checkpoint, and hypothesis without a stopwatch."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # an example may take as long as a busy machine needs
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint of two layers, called `tiny`."""
    import torch

    from worker.tiny_model import make_tiny_model

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(
        folder, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, max_position_embeddings=2048
    )
