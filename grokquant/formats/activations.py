"""What a quantized checkpoint says of activations and caches. Weights are read without it.

An engine that runs W8A8 or FP8 rounds the inputs of its matrices as well, with scales from the
checkpoint (static) or from each token (dynamic). Here they stay as they are, so this part of the
checkpoint is named and left out.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from grokquant.types import Source

# Of the inputs or outputs of a matrix: compressed-tensors, transformers (activation_scale),
# AutoFP8 (act_scale), fbgemm_fp8 (input_scale_ub).
_OF_A_MATRIX = re.compile(
    r"(.+)\.((?:input|output)_(?:global_scale|scale|zero_point)"
    r"|activation_scale|act_scale|input_scale_ub)"
)
# Of cached keys and values: compressed-tensors, AutoFP8 and vLLM.
_OF_A_CACHE = re.compile(r".+(?:attn\.[qkv]|attn\.kv|k_proj\.k|v_proj\.v)_(?:scale|zero_point)")


def without_activations(source: Source, described: Iterable[str]) -> Source:
    """`source`, whose matrices are unpacked, without scales of activations and caches.

    A note names them and what is `described`: how the config has activations quantized.
    """
    kinds = {name: kind for name in source.tensors if (kind := _kind(source, name))}
    counts = Counter(kinds.values())
    named = list(dict.fromkeys(described))
    named += [f"{count} {kind}" for kind, count in sorted(counts.items())]
    if not named:
        return source
    tensors = {name: ref for name, ref in source.tensors.items() if name not in kinds}
    note = (
        f"{source.path}: only the weights are read, activations and caches stay unquantized; "
        f"left out: {', '.join(named)}"
    )
    return replace(source, tensors=tensors, notes=(*source.notes, note))


def _kind(source: Source, name: str) -> str | None:
    """The last part of the name of a scale that is no part of the weights, else None."""
    found = _OF_A_MATRIX.fullmatch(name)
    if found:
        return found[2] if f"{found[1]}.weight" in source.tensors else None
    return name.rpartition(".")[2] if _OF_A_CACHE.fullmatch(name) else None
