"""vLLM and SGLang find the scheme of every matrix by their own rules, written down here.

vLLM (layers/quantization/compressed_tensors/utils.py): of a module's name the first target in the
config's order that equals it or whose `re:` pattern matches from its start; failing that the class,
where `Linear` also means fused experts. Fused modules are looked up by the names of their parts:
experts as expert 0's gate_proj, up_proj, down_proj, which must agree. Ignored are names that an
entry of `ignore` equals or matches.
SGLang: fused experts take the scheme of the target `Linear`, whatever their name.
"""

import re

import pytest
from conftest import unit_of

from grokquant.formats.compressed_tensors import FORMAT as compressed_tensors
from grokquant.grids import Scheme

INT4, INT8 = Scheme(4, 128), Scheme(8, 128)
# A family's own names in files: attention, experts' (gate, up, down), router; and vLLM's modules.
GROK = ("self_attn", "block_sparse_moe", ("w1", "w3", "w2"))
MIXTRAL = GROK
QWEN = ("self_attn", "mlp", ("gate_proj", "up_proj", "down_proj"))
VLLM = {"grok": ("attn", "moe_block"), "mixtral": GROK[:2], "qwen": QWEN[:2]}
FILES = {"grok": GROK, "mixtral": MIXTRAL, "qwen": QWEN}


def means(target: str, name: str) -> bool:
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


def vllm_scheme(config: dict, name: str) -> dict | None:
    """The weights section that vLLM gives the linear module or unfused expert part `name`."""
    if any(means(target, name) for target in config["ignore"]):
        return None
    targets = [(t, g) for g in config["config_groups"].values() for t in g["targets"]]
    by_name = [group for target, group in targets if means(target, name)]
    by_class = [group for target, group in targets if target == "Linear"]
    return (by_name or by_class)[0]["weights"]


def config_of(family: str, layers: int = 2, experts_of_layer: dict | None = None) -> dict:
    """The config of an output with int8 attention, int4 experts and whatever is said otherwise."""
    attention, moe, parts = FILES[family]
    units, routers = [], []
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        scheme = (experts_of_layer or {}).get(layer, INT4)
        for part in "qkvo":
            name = f"{prefix}.{attention}.{part}_proj.weight"
            units.append(unit_of(name, INT8, (256, 256), "copy"))
        for expert in range(8):
            for part in parts:
                name = f"{prefix}.{moe}.experts.{expert}.{part}.weight"
                units.append(unit_of(name, scheme, (256, 256)))
        routers.append(f"{prefix}.{moe}.gate")
    return compressed_tensors.quantization_config(units, [*routers, "lm_head"])


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("special", [{}, {1: INT8}], ids=["uniform", "one layer in int8"])
def test_vllm_finds_the_scheme_of_experts_and_attention(family, special):
    config = config_of(family, experts_of_layer=special)
    attention, moe = VLLM[family]
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        wanted = special.get(layer, INT4).bits
        for part in ("gate_proj", "up_proj", "down_proj"):
            found = vllm_scheme(config, f"{prefix}.{moe}.experts.0.{part}")
            assert found is not None and found["num_bits"] == wanted
        for part in "qkvo":
            found = vllm_scheme(config, f"{prefix}.{attention}.{part}_proj")
            assert found is not None and found["num_bits"] == 8


@pytest.mark.parametrize("family", FILES)
def test_routers_and_head_are_ignored_under_the_names_of_vllm(family):
    config, moe = config_of(family), VLLM[family][1]
    assert vllm_scheme(config, f"model.layers.1.{moe}.gate") is None
    assert vllm_scheme(config, "lm_head") is None


def test_sglang_finds_experts_by_their_class():
    groups = config_of("grok")["config_groups"].values()
    (found,) = [group for group in groups if "Linear" in group["targets"]]
    assert found["weights"]["num_bits"] == 4 and found["format"] == "pack-quantized"
