"""Models from Hugging Face checkpoints; a family a file."""

from worker.config import LLAMA, QWEN3
from worker.models.decoder import Decoder
from worker.models.llama import Llama
from worker.models.qwen3 import Qwen3

MODELS: dict[str, type[Decoder]] = {LLAMA: Llama, QWEN3: Qwen3}
"""Architecture, as config.json names it -> class. `worker.config.SUPPORTED` lists the same names, torch-free."""
