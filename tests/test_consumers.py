"""The table of consumers: what each takes of plans that were tried, and what people are told."""

import re

import pytest
from test_from_pretrained import INT4, RULES, output_of  # noqa: F401

from grokquant.cli.options import ENGINES
from grokquant.engines import CONSUMERS, Contents, Stored, verdicts, where_it_runs
from grokquant.errors import GateError
from grokquant.grids import GRIDS, Scheme
from grokquant.job.card import model_card
from grokquant.job.plan import build_plan, check_engine
from grokquant.reporting.inspection import describe
from grokquant.types import Matrix

G128, INT8, ASYM = Scheme(4, 128), Scheme(8, 128), Scheme(4, 128, False)
ROW = Scheme(4, None)
NF4, LLM_INT8 = GRIDS["nf4"].scheme, GRIDS["llm_int8"].scheme


def contents(
    form: str,
    family: str,
    experts=G128,
    attention=INT8,
    head=False,
    remote_code=False,
    names="published",
    hidden=256,
    dense=False,
    names_experts=False,
    joins=False,
    **others,
) -> Contents:
    """A model of one layer; `others` are grids of matrices by their names, `_` for dots."""
    places = [(f"attention.{part}", None) for part in "qkvo"]
    places += [
        (part, expert) for expert in range(0 if dense else 2) for part in ("gate", "up", "down")
    ]
    stored = []
    for part, expert in places:
        name = part if expert is None else f"experts.{expert}.{part}"
        scheme = others.get(name.replace(".", "_"), attention if expert is None else experts)
        reads = "attention.q" if part in ("attention.k", "attention.v") else part
        shape = (256, hidden if part in ("gate", "up") else 256)
        stored.append(Stored(Matrix(name, name, 0, part, reads, expert), shape, scheme))
    return Contents(form, family, tuple(stored), head, remote_code, names, names_experts, joins)


CT, BNB = "compressed-tensors", "bitsandbytes"
# What was tried (consumer, contents) and what came of it.
TRIED = [
    ("vllm", contents(CT, "grok-1"), "yes"),
    ("vllm", contents("gptq", "mixtral"), "yes"),
    ("vllm", contents("bf16", "grok-1", None, None), "yes"),
    ("vllm", contents(CT, "mixtral", ASYM, ASYM), "yes"),
    ("vllm", contents(CT, "qwen3-moe"), "not tried"),
    ("vllm", contents("gptq", "llama", Scheme(3, 128), INT8), "no: 2 and 3 bits"),
    ("vllm", contents(CT, "mixtral", experts_1_up=INT8), "no: experts of one layer"),
    ("vllm", contents(CT, "mixtral", experts_1_up=None), "no: experts of one layer"),
    ("vllm", contents(CT, "mixtral", attention_k=G128), "no: q, k and v"),
    ("vllm", contents(CT, "mixtral", Scheme(4, 256)), "no: groups other"),
    ("vllm", contents("gguf", "mixtral"), "no: formats other"),
    ("vllm", contents(CT, "mixtral", ROW, experts_0_down=G128), "no: .* one scale a row"),
    ("vllm", contents(CT, "mixtral", hidden=192), "no: experts of a hidden size"),
    ("vllm", contents(CT, "grok-2"), "no: Grok-2"),
    ("vllm", contents(CT, "llama"), "yes"),
    ("sglang", contents("gptq", "mixtral"), "no: formats other"),
    ("sglang", contents(CT, "mixtral", experts_1_up=INT8), "no: experts with several"),
    ("sglang", contents(CT, "mixtral", attention_k=G128), "no: q, k and v"),
    ("sglang", contents(CT, "grok-1"), "no: quantized experts with GELU"),
    ("sglang", contents(CT, "grok-1", None), "no: a quantized Grok-1"),
    ("sglang", contents("bf16", "grok-1", None, None), "no: a tied head"),
    ("sglang", contents("bf16", "grok-1", None, None, head=True), "not tried"),
    ("sglang", contents(CT, "mixtral"), "not tried"),
    *(
        ("llama.cpp", contents("gguf", family), "yes")
        for family in (
            *("grok-1", "mixtral", "llama", "mistral", "qwen2-moe", "qwen3-moe", "olmoe"),
            *("deepseek-v2", "deepseek-v3", "glm4-moe", "gpt-oss"),
            *("gemma", "gemma-2", "gemma-3", "qwen2", "qwen3"),
        )
    ),
    ("llama.cpp", contents("gguf", "grok-2"), "not tried"),
    ("llama.cpp", contents(CT, "grok-1"), "no: formats other"),
    ("gptqmodel", contents("gptq", "mixtral"), "no: Mixtral under its published names"),
    ("gptqmodel", contents("gptq", "mixtral", names="gptqmodel"), "yes"),
    ("vllm", contents("gptq", "mixtral", names="gptqmodel"), "no: the names that GPTQModel"),
    ("exllamav2", contents("gptq", "mixtral", G128, G128, names="gptqmodel"), "no: the names"),
    ("gptqmodel", contents("gptq", "llama"), "yes"),
    ("gptqmodel", contents("gptq", "qwen3-moe"), "yes"),
    ("gptqmodel", contents("gptq", "grok-1"), "no: Grok-1"),
    ("gptqmodel", contents("gptq", "grok-2"), "no: Grok-2"),
    ("gptqmodel", contents(CT, "llama"), "no: formats other"),
    ("transformers", contents(CT, "grok-1"), "no: Grok-1"),
    ("transformers", contents(CT, "grok-1", remote_code=True), "yes"),
    ("transformers", contents("bf16", "grok-1", None, None, remote_code=True), "yes"),
    ("lm-eval", contents(CT, "grok-1", remote_code=True), "yes"),
    ("transformers", contents(CT, "mixtral"), "yes"),
    ("transformers", contents(CT, "mixtral", ASYM), "no: zero points"),
    ("transformers", contents(CT, "mixtral", experts_1_up=INT8), "no: experts with several"),
    ("transformers", contents("gptq", "mixtral"), "wrong results: experts in gptq"),
    ("transformers", contents(BNB, "mixtral", LLM_INT8, LLM_INT8), "wrong results: experts in llm"),
    ("transformers", contents(BNB, "mixtral", NF4, NF4), "no: experts in nf4"),
    ("transformers", contents(CT, "gpt-oss"), "wrong results: gpt-oss"),
    ("transformers", contents(CT, "aria-text", names_experts=True), "wrong results: experts that"),
    ("transformers", contents(CT, "kimi-linear", joins=True), "no: tensors that it joins"),
    ("transformers", contents(CT, "grok-2"), "no: Grok-2"),
    ("transformers", contents(CT, "mixtral", None), "no: experts that are kept"),
    ("transformers", contents("gguf", "llama"), "no: formats other"),
    ("transformers", contents("gptq", "llama", dense=True), "yes"),
    ("transformers", contents("gptq", "llama", dense=True, attention_q=G128), "no: several grids"),
    ("transformers-grokquant", contents(BNB, "mixtral", LLM_INT8), "yes"),
    ("lm-eval", contents("gptq", "llama", None, G128), "no: "),
    ("lm-eval", contents(CT, "mixtral"), "yes"),
    ("lm-eval", contents("gptq", "mixtral", None, None), "no: formats other"),
    ("lm-eval-grokquant", contents("gptq", "grok-1"), "yes"),
    ("exllamav2", contents("gptq", "llama", G128, G128), "not tried"),
    ("exllamav2", contents("gptq", "llama"), "no: bits other than 4"),
    ("exllamav2", contents("gptq", "mixtral", G128, None), "no: several grids"),
    ("exllamav2", contents("gptq", "grok-1"), "no: Grok-1"),
    ("exllamav2", contents("gptq", "grok-2"), "no: Grok-2"),
    ("exllamav2", contents(CT, "llama"), "no: formats other"),
]
# lm-eval's own command line opens no more than transformers alone.
TRIED += [("lm-eval", c, a) for name, c, a in TRIED if name == "transformers" and a != "yes"]


@pytest.mark.parametrize(("consumer", "asked", "answer"), TRIED)
def test_the_table_says_what_was_tried(consumer, asked, answer):
    assert re.match(answer, verdicts(asked)[consumer])


LIMITS = [(consumer, limit) for consumer in CONSUMERS for limit in consumer.limits]


@pytest.mark.parametrize(("consumer", "limit"), LIMITS, ids=lambda x: getattr(x, "reason", ""))
def test_every_limit_has_a_case(consumer, limit):
    asked = [contents for name, contents, _ in TRIED if name == consumer.name]
    assert any(consumer.limit(contents) is limit for contents in asked)


def test_contents_that_need_a_newer_version_are_told_which():
    newer = (
        "vLLM (0.27 and later, Grok-1 beside grokquant), 0.29 and later for int8 experts in groups;"
    )
    assert newer in where_it_runs(contents(CT, "grok-1", INT8))[0]
    for asked in (contents("gptq", "grok-1", INT8), contents(CT, "grok-1", Scheme(8, None))):
        assert not any("0.29" in line for line in where_it_runs(asked))


def test_every_family_that_is_called_tried_has_a_case():
    taken = {(name, c.family) for name, c, answer in TRIED if answer == "yes"}
    claimed = {(consumer.name, family) for consumer in CONSUMERS for family in consumer.families}
    assert claimed <= taken


def test_the_option_has_every_consumer():
    assert list(ENGINES) == [consumer.name for consumer in CONSUMERS]


def test_what_goes_wrong_silently_is_said_first():
    lines = where_it_runs(contents("gptq", "mixtral"))
    assert lines[0].startswith("WRONG RESULTS WITHOUT AN ERROR in transformers alone: experts in")
    assert any(line.startswith("runs in: vLLM (0.27") for line in lines)
    assert not any("llama.cpp" in line for line in lines)  # reads other formats


def test_what_else_must_be_installed_is_named():
    asked = {
        "gptq": "transformers alone with optimum and gptqmodel",
        CT: "transformers alone with compressed-tensors",
        "bf16": "transformers alone;",
    }
    for form, wanted in asked.items():
        scheme = None if form == "bf16" else G128
        lines = where_it_runs(contents(form, "llama", None, scheme, dense=True))
        assert wanted in lines[0], form
    both = where_it_runs(contents(CT, "grok-1", remote_code=True))[0]
    assert "transformers alone with compressed-tensors and trust_remote_code" in both


def test_plan_for_an_engine_names_the_rule_to_change(tiny_recipe):
    rules = [
        {"match": "layers.1.experts.1.*", "method": "rtn", "bits": 8, "group": 32},
        {"match": "*", "method": "rtn", "bits": 4, "group": 32},
    ]
    plan = build_plan(tiny_recipe(*rules))
    found = r"experts of one layer .*\(layers\.1\.experts\.1\.gate, of quantize\[0\]\): give"
    with pytest.raises(GateError, match=found):
        check_engine(plan, "vllm")
    check_engine(plan, "transformers-grokquant")
    # Groups as long as a row become one scale per row, but those of down, which is longer, do not.
    plan = build_plan(tiny_recipe({"match": "*", "method": "rtn", "bits": 4, "group": 128}))
    found = r"layers\.0\.experts\.0\.down, of quantize\[0\]\): use a smaller group"
    with pytest.raises(GateError, match=found):
        check_engine(plan, "vllm")
    with pytest.raises(GateError, match=r"llama.cpp does not take formats .* set output\.format"):
        check_engine(plan, "llama.cpp")


def test_the_model_card_says_it_too(tiny_recipe):
    card = model_card(
        build_plan(tiny_recipe({"match": "*", "method": "rtn", "bits": 4, "group": 32})), []
    )
    assert "\n* runs in: vLLM (0.27" in card and "```sh\nvllm serve out\n```" in card
    assert "\n* not in: SGLang (quantized experts with GELU)" in card


@pytest.mark.parametrize("rules", ["asymmetric", "mixed", "partly", "attention", "int4"])
def test_inspect_agrees_with_what_transformers_alone_was_seen_to_do(output_of, rules):  # noqa: F811
    """tests/test_from_pretrained.py shows that it cannot read the first four of Mixtral."""
    found = describe(output_of("mixtral", rules))["runs_in"]
    assert found["transformers"].startswith("yes" if RULES[rules] is INT4 else "no: ")
