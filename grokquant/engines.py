"""Which program takes which output: one row per consumer, with the version that was tried.

A row lists the limits that were met, the first of which is the reason of a refusal. Programs that
load something and compute something else come before those that refuse it, so that this is said
first. Nothing here is guessed: what nobody has tried is in no row, and `untried` says so.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from grokquant.grids import Scheme
from grokquant.types import Matrix


@dataclass(frozen=True)
class Stored:
    """A matrix in an output: its place, shape [out, in] and grid, None if it is not quantized."""

    matrix: Matrix
    shape: tuple[int, ...]
    scheme: Scheme | None


@dataclass(frozen=True)
class Contents:
    """What an output holds, as far as consumers care."""

    format: str
    family: str
    matrices: tuple[Stored, ...]
    own_head: bool = False
    remote_code: bool = False
    names: str = "published"
    names_experts: bool = False
    joins: bool = False

    @property
    def quantized(self) -> list[Stored]:
        return [stored for stored in self.matrices if stored.scheme]

    @property
    def experts(self) -> list[Stored]:
        return [stored for stored in self.matrices if stored.matrix.expert is not None]

    @property
    def quantized_experts(self) -> list[Stored]:
        return [stored for stored in self.experts if stored.scheme]


WRONG = "WRONG RESULTS WITHOUT AN ERROR"
AtFault = Callable[[Contents], list[Stored]]


@dataclass(frozen=True)
class Limit:
    """`at_fault` gives the matrices that a consumer does not take. `wrong`: it does not refuse
    them, but computes something else. `about`: what has to change for it."""

    reason: str
    at_fault: AtFault
    way_out: str
    wrong: bool = False
    about: Literal["rules", "model", "format", "head"] = "rules"


@dataclass(frozen=True)
class Newer:
    """What a consumer takes from a version on only."""

    reason: str
    at_fault: AtFault
    version: str


@dataclass(frozen=True)
class Consumer:
    """A program: its name for options, its title, the version tried, and its limits.

    `newer`: limits of the versions before those that it names, in ascending order. `families` are
    those tried; other families may work. `ran` is False where nobody has run it here and the limits
    are those of its code. `by_code`: for Grok-1 it needs the file of `output.remote_code`.
    `packages`: what else has to be installed for a format.
    """

    name: str
    title: str
    version: str
    limits: tuple[Limit, ...]
    families: tuple[str, ...] = ()
    ran: bool = True
    by_code: bool = False
    packages: Mapping[str, str] = field(default_factory=dict)
    newer: tuple[Newer, ...] = ()

    def limit(self, contents: Contents) -> Limit | None:
        """The first limit that `contents` meets, None if the program takes them."""
        return next((limit for limit in self.limits if limit.at_fault(contents)), None)

    def tried(self, contents: Contents) -> bool:
        return self.ran and (not self.families or contents.family in self.families)

    def titled(self, contents: Contents) -> str:
        """The title, what else `contents` need there, and the version that they need."""
        needs = [package] if (package := self.packages.get(contents.format)) else []
        if self.by_code and contents.remote_code:
            needs.append("trust_remote_code")
        title = f"{self.title} with {' and '.join(needs)}" if needs else self.title
        newer = [need for need in self.newer if need.at_fault(contents)]
        since = f", {newer[-1].version} and later for {newer[-1].reason}" if newer else ""
        return title + since


def _formats(*formats: str) -> Limit:
    def at_fault(contents: Contents) -> list[Stored]:
        return [] if contents.format in formats else list(contents.matrices)

    way_out = f"set output.format to {' or '.join(formats)}"
    return Limit(
        f"formats other than {', '.join(formats)}",
        at_fault,
        way_out,
        about="format",
    )


def _model(family: str, reason: str) -> Limit:
    def at_fault(contents: Contents) -> list[Stored]:
        return list(contents.matrices) if contents.family == family else []

    return Limit(reason, at_fault, "use another program", about="model")


def _grids(reason: str, way_out: str, held: Callable[[Scheme], bool], *formats: str) -> Limit:
    """`held` says whether the consumer takes a grid, in `formats` or in all."""

    def at_fault(contents: Contents) -> list[Stored]:
        if formats and contents.format not in formats:
            return []
        return [s for s in contents.quantized if s.scheme and not held(s.scheme)]

    return Limit(reason, at_fault, way_out)


def _differing(stored: Iterable[Stored], key: Callable[[Stored], object]) -> list[Stored]:
    """The matrices whose grid is not that of the first with the same key."""
    first: dict[object, Scheme | None] = {}
    return [s for s in stored if first.setdefault(key(s), s.scheme) != s.scheme]


def _of_layer(contents: Contents) -> list[Stored]:
    return _differing(contents.experts, lambda s: s.matrix.layer)


def _rows_beside_groups(contents: Contents) -> list[Stored]:
    """Those of them that have the bits of the others: a group as long as a row is one scale a row,
    as `channel` is, but not where rows are longer."""
    grids: dict[int, set[Scheme | None]] = {}
    for s in contents.experts:
        grids.setdefault(s.matrix.layer, set()).add(s.scheme and replace(s.scheme, group_size=None))
    whole = {s.matrix.layer for s in contents.experts if s.scheme and not s.scheme.group_size}
    differing = (s for s in _of_layer(contents) if s.matrix.layer in whole)
    return [s for s in differing if len(grids[s.matrix.layer]) == 1]


def _of_model(contents: Contents) -> list[Stored]:
    return _differing(contents.experts, lambda s: None)


def _of_fused(contents: Contents) -> list[Stored]:
    outside = (s for s in contents.matrices if s.matrix.expert is None)
    return _differing(outside, lambda s: (s.matrix.layer, s.matrix.reads))


def _of_outputs(contents: Contents) -> list[Stored]:
    return _differing(contents.matrices, lambda s: None)


def _in_format(format: str, at_fault: AtFault) -> AtFault:
    return lambda contents: at_fault(contents) if contents.format == format else []


_ONE_GRID = "give these matrices one grid"
_LAYER = Limit("experts of one layer with several grids", _of_layer, _ONE_GRID)
_WHOLE_ROWS = Limit(
    "experts of one layer with several grids, one scale a row and groups",
    _rows_beside_groups,
    "use a smaller group, or channel for all",
)
_FUSED = Limit("q, k and v, or gate and up, of one layer with several grids", _of_fused, _ONE_GRID)
_MODEL_EXPERTS = Limit("experts with several grids", _of_model, _ONE_GRID)
_SYMMETRIC = _grids("zero points", "use symmetric: true", lambda scheme: scheme.symmetric)
_MARLIN_GROUPS = _grids(
    "groups other than 32, 64, 128 or rows",
    "use group: 128",
    lambda scheme: scheme.group_size in (32, 64, 128, None),
)
_FOUR_OR_EIGHT = _grids("2 and 3 bits", "use bits: 4", lambda scheme: scheme.bits in (4, 8), "gptq")
_NO_GROK_2 = _model("grok-2", "Grok-2")


def _quantized_experts(contents: Contents) -> list[Stored]:
    return contents.quantized_experts


def _grok_experts(contents: Contents) -> list[Stored]:
    return contents.quantized_experts if contents.family == "grok-1" else []


def _grok_quantized(contents: Contents) -> list[Stored]:
    return contents.quantized if contents.family == "grok-1" else []


def _mixtral_named(names: str) -> AtFault:
    """All matrices of a Mixtral whose tensors have these names."""

    def at_fault(contents: Contents) -> list[Stored]:
        named = contents.family == "mixtral" and contents.names == names
        return list(contents.matrices) if named else []

    return at_fault


def _grok_without_code(contents: Contents) -> list[Stored]:
    missing = contents.family == "grok-1" and not contents.remote_code
    return list(contents.matrices) if missing else []


def _grok_without_head(contents: Contents) -> list[Stored]:
    missing = contents.family == "grok-1" and not contents.own_head
    return list(contents.matrices) if missing else []


def _narrow(contents: Contents) -> list[Stored]:
    """Experts whose hidden size Marlin does not tile: it is the input of gate and up."""
    inputs = [s for s in contents.quantized_experts if s.matrix.part in ("gate", "up")]
    return [s for s in inputs if s.shape[1] % 128]


def _int8_experts(contents: Contents) -> list[Stored]:
    return [s for s in contents.quantized_experts if s.scheme and s.scheme.grid == "llm_int8"]


def _experts_of_8_bits_in_groups(contents: Contents) -> list[Stored]:
    schemes = ((s, s.scheme) for s in contents.quantized_experts)
    return [s for s, scheme in schemes if scheme and scheme.bits == 8 and scheme.group_size]


def _experts_beside_quantized(contents: Contents) -> list[Stored]:
    return [s for s in contents.experts if s.scheme is None] if contents.quantized else []


def _gpt_oss(contents: Contents) -> list[Stored]:
    return contents.quantized if contents.family == "gpt-oss" else []


def _experts_of_one_tensor(contents: Contents) -> list[Stored]:
    """Experts for which files of transformers have no single tensors."""
    return contents.experts if contents.names_experts else []


def _joined(contents: Contents) -> list[Stored]:
    return contents.quantized if contents.joins else []


_PUBLISHED_NAMES = Limit(
    "the names that GPTQModel looks for",
    _mixtral_named("gptqmodel"),
    "set output.names to published",
    about="model",
)
_IMPORT = "import grokquant first"
_TRANSFORMERS_ALONE = (
    Limit(
        "Grok-1 without its code",
        _grok_without_code,
        "set output.remote_code to true",
        about="model",
    ),
    _NO_GROK_2,
    Limit("gpt-oss, whose experts stay random", _gpt_oss, _IMPORT, wrong=True),
    Limit(
        "experts that its own files hold as one tensor, which stay random",
        _experts_of_one_tensor,
        _IMPORT,
        wrong=True,
    ),
    Limit("tensors that it joins or layers of its own, beside quantized ones", _joined, _IMPORT),
    Limit(
        "experts in gptq, which stay random",
        _in_format("gptq", _quantized_experts),
        _IMPORT,
        wrong=True,
    ),
    Limit(
        "experts in llm_int8, whose codes it takes for weights", _int8_experts, _IMPORT, wrong=True
    ),
    Limit("experts in nf4 and fp4", _in_format("bitsandbytes", _quantized_experts), _IMPORT),
    _formats("compressed-tensors", "gptq", "bitsandbytes", "bf16"),
    _SYMMETRIC,
    _MODEL_EXPERTS,
    Limit("experts that are kept beside quantized matrices", _experts_beside_quantized, _IMPORT),
    Limit("several grids in gptq", _in_format("gptq", _of_outputs), _ONE_GRID),
)

CONSUMERS = (
    Consumer(
        "llama.cpp",
        "llama.cpp",
        "b11434 and 0.5.0",
        (_formats("gguf"),),
        (
            "grok-1",
            "mixtral",
            "llama",
            "mistral",
            "qwen2-moe",
            "qwen3-moe",
            "olmoe",
            "deepseek-v2",
            "gpt-oss",
            "gemma-2",
            "gemma-3",
            "qwen2",
            "qwen3",
            "deepseek-v3",
            "glm4-moe",
            "gemma",
        ),
    ),
    Consumer(
        "vllm",
        "vLLM (0.27 and later, Grok-1 beside grokquant)",
        "0.27 to 0.30 and 0.32 on a CPU, and 0.33 with the compiled library of 0.32",
        (
            _formats("compressed-tensors", "gptq", "bf16"),
            _NO_GROK_2,
            _PUBLISHED_NAMES,
            _FOUR_OR_EIGHT,
            _MARLIN_GROUPS,
            _WHOLE_ROWS,
            _LAYER,
            _FUSED,
            Limit(
                "experts of a hidden size that 128 does not divide",
                _narrow,
                "leave them unquantized",
            ),
        ),
        ("grok-1", "mixtral", "llama"),
        newer=(
            Newer(
                "int8 experts in groups",
                _in_format("compressed-tensors", _experts_of_8_bits_in_groups),
                "0.29",
            ),
        ),
    ),
    Consumer(
        "sglang",
        "SGLang",
        "0.5.23, read only",
        # Its int4 experts assert SiLU, load_weights asks for lm_head.weight, and Grok's layers have
        # no prefix by which a grid could find them. Fused experts take the grid of `Linear`. It
        # cannot run without a GPU: the kernels that its package requires are for CUDA only.
        (
            _formats("compressed-tensors", "bf16"),
            Limit("quantized experts with GELU", _grok_experts, "leave them unquantized"),
            Limit("a quantized Grok-1", _grok_quantized, "quantize no matrix"),
            Limit("a tied head", _grok_without_head, "set output.lm_head to true", about="head"),
            _MODEL_EXPERTS,
            _FUSED,
        ),
        ran=False,
    ),
    Consumer("transformers-grokquant", "transformers after import grokquant", "5.19 to 5.24", ()),
    Consumer(
        "transformers",
        "transformers alone",
        "5.24 with compressed-tensors 0.20, bitsandbytes 0.50, or optimum 2.3 (gptqmodel 7.6, 7.7)",
        _TRANSFORMERS_ALONE,
        by_code=True,
        packages={
            "compressed-tensors": "compressed-tensors",
            "gptq": "optimum and gptqmodel",
            "bitsandbytes": "bitsandbytes",
        },
    ),
    Consumer(
        "lm-eval",
        "lm_eval on the command line",
        "0.4.13",
        (*_TRANSFORMERS_ALONE, _formats("compressed-tensors", "bf16")),
        by_code=True,
        packages={"compressed-tensors": "compressed-tensors"},
    ),
    Consumer("lm-eval-grokquant", "python -m grokquant.lm_eval", "0.4.13", ()),
    Consumer(
        "gptqmodel",
        "GPTQModel",
        "7.6 and 7.7",
        (
            _formats("gptq"),
            _model("grok-1", "Grok-1"),
            _NO_GROK_2,
            Limit(
                "Mixtral under its published names",
                _mixtral_named("published"),
                "set output.names to gptqmodel",
                about="model",
            ),
        ),
        ("llama", "mixtral", "qwen3-moe"),
    ),
    Consumer(
        "exllamav2",
        "exllamav2",
        "0.3.2, read only",
        # Its loader knows one grid of 4 bits, and experts as block_sparse_moe.experts.*.w1; it has
        # no Grok. It compiles its kernels for CUDA when it is imported.
        (
            _formats("gptq"),
            _model("grok-1", "Grok-1"),
            _NO_GROK_2,
            _PUBLISHED_NAMES,
            _grids("bits other than 4", "use bits: 4", lambda scheme: scheme.bits == 4),
            Limit("several grids", _of_outputs, _ONE_GRID),
        ),
        ran=False,
    ),
)
BY_NAME = {consumer.name: consumer for consumer in CONSUMERS}


def verdicts(contents: Contents) -> dict[str, str]:
    """For programs: consumer -> "yes", "not tried", "no: reason", or "wrong results: reason"."""
    found = {}
    for consumer in CONSUMERS:
        if limit := consumer.limit(contents):
            found[consumer.name] = f"{'wrong results' if limit.wrong else 'no'}: {limit.reason}"
        else:
            found[consumer.name] = "yes" if consumer.tried(contents) else "not tried"
    return found


def where_it_runs(contents: Contents) -> list[str]:
    """For people: a line each for where it runs wrongly, rightly, perhaps, and not at all.

    Programs that read other formats are left out.
    """
    limits = [(consumer, consumer.limit(contents)) for consumer in CONSUMERS]
    wrong = [f"{c.title}: {limit.reason}" for c, limit in limits if limit and limit.wrong]
    lines = [f"{WRONG} in {line}" for line in wrong]
    taken = [consumer for consumer, limit in limits if limit is None]
    lines.append("runs in: " + "; ".join(c.titled(contents) for c in taken if c.tried(contents)))
    if untried := [c.title for c in taken if not c.tried(contents)]:
        lines.append(f"not tried with {contents.family}: {'; '.join(untried)}")
    refused = [(c, limit) for c, limit in limits if limit and not limit.wrong]
    reasons = [f"{c.title} ({limit.reason})" for c, limit in refused if limit.about != "format"]
    if reasons:
        lines.append(f"not in: {'; '.join(reasons)}")
    return lines
