"""The quantizer that loads our outputs in transformers without dequantizing them.

Without it transformers dequantizes the outputs that it can read, and reads some wrongly without a
warning: if the experts of a layer have several grids, all get the same one, and the experts of
gpt-oss are initialized randomly. So our quantizer loads every output, whatever quant_method its
config.json shows to engines.
"""

import re
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from grokquant.checkpoint import Checkpoint, open_checkpoint
from grokquant.devices import CPU
from grokquant.families.family import tie_weights
from grokquant.formats import FORMATS
from grokquant.runtime.load import absent_parameters, fill_model
from grokquant.runtime.packed import pack_model
from grokquant.version import OWN


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of an output, as it is."""

    def __init__(self, **content: Any) -> None:
        self.content = content
        self.quant_method = OWN  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.content)


class PackedQuantizer(HfQuantizer):
    """Keeps matrices packed; they are read when they are first used.

    transformers makes the model and chooses a device for every tensor. All tensors are read by us,
    since transformers knows neither the names nor the layouts of most.
    """

    is_trainable = False
    quantization_config: PackedConfig
    checkpoint: Checkpoint
    dtype: torch.dtype

    def is_serializable(self) -> bool:
        return False

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The only hook before transformers looks for files, which must be safetensors; with a
        name in the config it does not look."""
        output_format = FORMATS.get(str(self.quantization_config.content.get("format")))
        if output_format is not None and output_format.needs_own_loader:
            config.transformers_weights = "model.safetensors"
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs["checkpoint_files"]
        self.dtype = cast(torch.dtype, model.config.dtype)
        with CPU:  # transformers makes its models on the meta device
            self.checkpoint = open_checkpoint(Path(files[0]).parent)
        pack_model(model, self.checkpoint, self.dtype)
        if self.checkpoint.num_experts:
            model.set_experts_implementation("eager")
        # transformers reads the files in this list next; it gets one without tensors.
        self._place = tempfile.TemporaryDirectory()
        files[:] = [f"{self._place.name}/nothing.safetensors"]
        save_file({}, files[0])
        # All but these are read by us, so transformers need not report them as missing.
        absent = "|".join(map(re.escape, absent_parameters(model, self.checkpoint)))
        model._keys_to_ignore_on_load_missing = {f"^(?!(?:{absent})$)"}
        # transformers reads neither end of a tied pair and would report both as missing.
        self._tied = model.all_tied_weights_keys
        model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._place.cleanup()
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("device_map: packed matrices cannot be offloaded to CPU or disk")
        fill_model(model, self.checkpoint, self.dtype, CPU)
        model.all_tied_weights_keys = self._tied
        tie_weights(model)
        del self.checkpoint
