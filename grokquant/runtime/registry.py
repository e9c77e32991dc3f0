"""What transformers needs to know so that `from_pretrained` loads our outputs, packed.

Only outputs that transformers cannot load by itself come here: those whose config.json says
`quant_method: grokquant`, and all of Grok's, whose classes are ours.
"""

import re
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from grokquant.checkpoint import open_checkpoint
from grokquant.formats import OWN
from grokquant.runtime.packed import pack_model, read_packed


@register_quantization_config(OWN)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of an output, as it is."""

    def __init__(self, **content: Any) -> None:
        self.__dict__.update(content)
        self.quant_method = OWN  # type: ignore[assignment]


@register_quantizer(OWN)
class PackedQuantizer(HfQuantizer):
    """Leaves matrices as packed as they lie on disk; they are multiplied out when used."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint = open_checkpoint(Path(kwargs["checkpoint_files"][0]).parent)
        pack_model(model, checkpoint, kwargs["dtype"])
        model.set_experts_implementation("eager")
        packed = {re.escape(ref.name.removesuffix("weight")) for _, ref in checkpoint.units()}
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, *(f"^{stem}" for stem in packed)}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        read_packed(model, model.device)
