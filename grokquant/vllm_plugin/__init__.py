"""Grok-1 in vLLM, which has had no class for it since 0.25.

vLLM calls `register` in each of its processes, whatever model it serves (pyproject.toml names it in
the group `vllm.general_plugins`). So it must be cheap, repeatable and silent, and neither it nor
the model's modules may import numba: vLLM's workers on the CPU fail where numba came first.
"""

_MODEL = "grokquant.vllm_plugin.model:Grok1ForVllm"


def register() -> None:
    """Tells vLLM which class serves Grok-1. Config and tokenizer are known to transformers as soon
    as grokquant is imported."""
    try:
        from vllm import ModelRegistry
    except ImportError:
        return
    for architecture in ("Grok1ForCausalLM", "Grok1ModelForCausalLM"):
        ModelRegistry.register_model(architecture, _MODEL)
