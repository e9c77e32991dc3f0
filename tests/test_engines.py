"""vLLM and SGLang find the scheme of every matrix by their own rules, written down here.

vLLM (layers/quantization/compressed_tensors/utils.py): of a module's name the first target in the
config's order that equals it or whose `re:` pattern matches from its start; failing that the class,
where `Linear` also means fused experts. Fused modules are looked up by the names of their parts:
experts as expert 0's gate_proj, up_proj, down_proj, which must agree. Ignored are names that an
entry of `ignore` equals or matches.
vLLM up to 0.26 and SGLang ask for a fused linear module by its own name, then by the class, and
only then by its parts: without a target of its own, qkv_proj gets the scheme of `Linear`. vLLM from
0.27 asks for the parts before the class.
SGLang: fused experts take the scheme of the target `Linear`, whatever their name.
gptq (quantization/utils/gptq_utils.py): the first rule of `dynamic` whose pattern matches the fused
module's name from its start, `experts` for all experts of a layer; parts are not asked for.
"""

import re

import pytest
import torch
from conftest import unit_of

import grokquant
from grokquant.formats.compressed_tensors import FORMAT as compressed_tensors
from grokquant.formats.gptq import FORMAT as gptq
from grokquant.formats.targets import engine_targets
from grokquant.grids import Scheme
from grokquant.job import pipeline
from grokquant.job.metadata import output_config
from grokquant.job.plan import build_plan
from grokquant.sources import open_source

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


def gptq_grid(config: dict, name: str) -> dict | None:
    """The bits and group that engines give the module `name`, None if it is not quantized."""
    for rule, grid in config["dynamic"].items():
        if re.match(rule[2:], name):
            return None if rule.startswith("-:") else grid
    return {"bits": config["bits"], "group_size": config["group_size"]}


def config_of(
    family: str, layers: int = 2, experts_of_layer: dict | None = None, form=compressed_tensors
) -> dict:
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
    return form.quantization_config(units, [*routers, "lm_head"])


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


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("special", [{}, {1: INT8}], ids=["uniform", "one layer in int8"])
def test_fused_modules_have_targets_of_their_own(family, special):
    """vLLM up to 0.26 and SGLang would else give qkv_proj the experts' int4."""
    config = config_of(family, experts_of_layer=special)
    for layer in range(2):
        found = vllm_scheme(config, f"model.layers.{layer}.{VLLM[family][0]}.qkv_proj")
        assert found is not None and found["num_bits"] == 8


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("special", [{}, {1: INT8}], ids=["uniform", "one layer in int8"])
def test_gptq_rules_name_the_modules_that_engines_fuse(family, special):
    config = config_of(family, experts_of_layer=special, form=gptq)
    attention, moe = VLLM[family]
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for module in ("qkv_proj", "o_proj"):
            assert gptq_grid(config, f"{prefix}.{attention}.{module}")["bits"] == 8
        wanted = special.get(layer, INT4).bits
        assert gptq_grid(config, f"{prefix}.{moe}.experts")["bits"] == wanted
        assert gptq_grid(config, f"{prefix}.{moe}.gate") is None


@pytest.mark.parametrize("form", [compressed_tensors, gptq])
def test_dense_layers_and_shared_experts_are_fused_too(form):
    """Two grids in all places where DeepSeek has them; layer 1 keeps its attention."""
    parts = [
        ("self_attn.q_a_proj", "self_attn.fused_qkv_a_proj"),
        ("self_attn.kv_a_proj_with_mqa", "self_attn.fused_qkv_a_proj_with_mqa"),
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.gate_up_proj"),
        ("mlp.shared_experts.up_proj", "mlp.shared_experts.gate_up_proj"),
        ("mlp.shared_experts.down_proj", "mlp.shared_experts.down_proj"),
    ]
    kept = [f"model.layers.1.{name}" for name, _ in parts[:2]]
    names = [f"model.layers.{layer}.{name}" for layer in range(2) for name, _ in parts]
    units = [
        unit_of(f"{name}.weight", INT8 if "mlp" in name else INT4, (256, 256))
        for name in names
        if name not in kept
    ]
    units += [unit_of(f"model.layers.0.mlp.experts.{n}.up_proj.weight", INT4) for n in range(9)]
    config = form.quantization_config(units, kept)
    for layer in range(2):
        for name, fused in parts:
            module = f"model.layers.{layer}.{fused}"
            wanted = 8 if "mlp" in name else 4 if layer == 0 else None
            if form is gptq:
                assert (gptq_grid(config, module) or {}).get("bits") == wanted
            else:
                assert (vllm_scheme(config, module) or {}).get("num_bits") == wanted


def test_a_module_whose_parts_differ_is_named_in_no_group():
    """No engine can hold it; by the name of a part's group it would be read wrongly."""
    q, k, v = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    groups, ignored = engine_targets([[q, k]], [v], fused_experts=True)
    assert not any("qkv_proj" in target for target in [*groups[0], *ignored])


def test_gptq_modules_that_are_kept_come_before_the_grids_of_others():
    """A pattern of all layers' q_proj also matches the layer that keeps it."""
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)]
    units = [unit_of(f"{name}.weight", INT8, (64, 256)) for name in names[1:]]
    units += [unit_of(f"model.layers.0.mlp.experts.{n}.up_proj.weight", INT4) for n in range(9)]
    config = gptq.quantization_config(units, names[:1])
    assert gptq_grid(config, names[0]) is None and gptq_grid(config, names[3])["bits"] == 8


@pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
def test_the_head_is_written_where_an_engine_asks_for_it(tiny_recipe, tmp_path, form):
    rule = {"match": "*", "method": "rtn"} | ({"grid": "q8_0"} if form == "gguf" else {"bits": 8})
    outputs = {}
    for lm_head in (False, True):
        output = {"path": str(tmp_path / str(lm_head)), "format": form, "lm_head": lm_head}
        outputs[lm_head] = pipeline.quantize(tiny_recipe(rule, output=output))
    stored = open_source(outputs[True]) if form == "compressed-tensors" else None
    if stored is not None:
        embedding = stored.tensors["model.embed_tokens.weight"].read()
        assert torch.equal(stored.tensors["lm_head.weight"].read(), embedding)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = [grokquant.load(output)[0](tokens).logits for output in outputs.values()]
    assert torch.equal(*logits)


def test_grok_says_what_engines_would_assume_wrongly(tiny_recipe):
    config = output_config(build_plan(tiny_recipe()))
    assert config["moe_intermediate_size"] == config["intermediate_size"] == 256
    assert config["router_logit_softcapping"] == 0 and config["moe_router_renormalize"] is False
    assert config["load_presharded_moe"] is False
