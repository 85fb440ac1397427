"""Llama: the shared decoder as it is."""

from worker.models.decoder import Decoder


class Llama(Decoder):
    """LlamaForCausalLM; Llama 3's rope scaling comes with the config."""
