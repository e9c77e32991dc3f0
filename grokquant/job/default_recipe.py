"""The recipe of a model for which nobody has written one: the best rules for its matrices.

    shipped recipe     int4     what is wanted: bits or a grid, and a format
    + a model          Mixtral  its matrices, and how they are stored
    = a recipe         layers.*.experts.*: gptq, int4 g128; layers.*.attention.*: rtn, int8 g128

Matrices that every token passes and that take little room get 8 bits, the others what is asked for.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grokquant.checkpoint import Checkpoint, Opener, open_checkpoint
from grokquant.errors import InputError
from grokquant.families.derived import DerivedFamily
from grokquant.families.tokenizer import has_tokenizer
from grokquant.files.published import published_path
from grokquant.files.typed_paths import expanded
from grokquant.formats import FORMATS
from grokquant.grids import GRIDS, Scheme
from grokquant.job.budget.memory import total_bytes
from grokquant.job.goals import EFFORTS, HIGH, LOW, NORMAL, Goal, aim_of
from grokquant.job.units import unit_of
from grokquant.methods import METHODS
from grokquant.recipe import CalibrationSection, Rule, load_values
from grokquant.sources.located import located
from grokquant.toy import TOY_LENGTH, TOY_PATH
from grokquant.types import Matrix

# Groups of a matrix of integers, best first: engines have the fastest kernels for 128.
_GROUPS = (128, 64, 32, "channel")
# A Hessian of more input features than this takes gigabytes and minutes for each expert.
_WIDE = 16384
_HESSIAN_BLOCK = 4096
_ROWS = 128
# Memory that two-sided rounding takes for each number in the states of these rows: eleven copies in
# bfloat16 or float32. They should leave a third of the memory to weights and to other programs.
_STATES_BYTES = 30
_MEMORY_SHARE = 2 / 3
# Several kinds of text of every installation; python-docs has 35 of such sequences, not 128.
_TEXTS = {"python-docs": 1.0, "python-code": 1.0, "package-docs": 2.0}
# Longer rows cost time and show the same statistics.
_ROW_LENGTH = 2048
# Where the input features of a matrix are no multiple of 256, as those of llama.cpp's K types are.
_BESIDE_K = ("iq4_nl", "q8_0")
# Formats of which readers take only one grid for the whole model.
_ONE_GRID = ("gptq", "bitsandbytes")
_AS_IT_IS: dict[str, Any] = {"method": "unquantized"}

Values = dict[str, Any]
# (what is aimed at, bits that all matrices have at the source or None, whether text can be read)
# -> rules, best first
Candidates = Callable[["Goal", int | None, bool], Iterator[Values]]


def values_for(
    model: str | Path,
    recipe: str | Path | None = None,
    bits: int | None = None,
    grid: str | None = None,
    format: str | None = None,
    output: str | Path | None = None,
    effort: str = NORMAL,
    opened: Opener = open_checkpoint,
) -> Values:
    """The keys of a recipe for `model`, in their order; all others have their defaults.

    `model` is a directory, a model in the cache of the hub, or `toy`. `recipe` is one of GOALS, or
    a file whose rules are taken; else `bits` or a `grid` say what the large matrices become, and
    nothing means 4 bits. `effort` is one of EFFORTS. `format` and `output` are those of the
    recipe's `output`; the default is a directory beside which the command runs, named after the
    model. Raises InputError.
    """
    model = expanded(str(model))
    aim = aim_of(recipe, bits, grid, format, effort)
    if aim is None:
        assert recipe is not None
        return _of_file(model, recipe, format, output)
    name, goal = aim
    checkpoint = opened(model, None)
    rules = _rules(checkpoint, goal)
    if effort == HIGH and not any(rule["method"] == "two-sided" for rule in rules):
        text = f"high changes nothing: no matrices of {model} are calibrated that it is for"
        raise InputError(text, "effort")
    length = _row_length(checkpoint)
    text = _text(checkpoint)  # shown, since a better one is the first thing to change
    rows = {"calibration": {"text": text, "samples": _ROWS, "length": length}}
    is_calibrated = any(METHODS[rule["method"]].needs_site for rule in rules)
    return {
        "model": {"path": model},
        **(rows if is_calibrated else {}),
        "quantize": rules,
        "output": {"path": str(output or _place(model, name)), "format": goal.format},
        "eval": {"length": length},
    }


def _of_file(
    model: str, recipe: str | Path, format: str | None, output: str | Path | None
) -> Values:
    """The recipe of a file, for another model and output."""
    values = load_values(recipe)
    section = values.get("output")
    section = section if isinstance(section, dict) else {}
    place = str(output or _place(model, Path(recipe).stem))
    format_key = {"format": format} if format else {}
    values["model"] = {"path": model}
    values["output"] = section | {"path": place} | format_key
    return values


# --- rules


def _rules(checkpoint: Checkpoint, goal: Goal) -> list[Values]:
    """A rule for each role of matrices, or one for all of them if they are alike."""
    rules = [rule for role in _roles(checkpoint) for rule in _rules_of(checkpoint, goal, *role)]
    bodies = [{key: value for key, value in rule.items() if key != "match"} for rule in rules]
    if all(body == bodies[0] for body in bodies):
        return [{"match": "layers.*"} | bodies[0]]
    return rules


def _roles(checkpoint: Checkpoint) -> Iterator[tuple[str, list[Matrix]]]:
    """experts, mlp, shared, attention and their matrices; the large ones first."""
    roles: dict[str, list[Matrix]] = {}
    for matrix in checkpoint.matrices():
        roles.setdefault(matrix.kind.partition(".")[0], []).append(matrix)
    order = ("experts", "mlp")
    yield from sorted(roles.items(), key=lambda role: role[0] not in order)


def _rules_of(
    checkpoint: Checkpoint, goal: Goal, role: str, matrices: list[Matrix]
) -> Iterator[Values]:
    """The rules of one role: one for all its parts, since engines fuse some of them.

    Where there is none, and for llama.cpp, which fuses none, each part gets its best.
    """
    fits = all(_has_two_sides(checkpoint, matrix) for matrix in matrices)
    if not fits or (goal.effort == NORMAL and not _is_quick(checkpoint, matrices)):
        goal = replace(goal, effort=LOW)
    everything = checkpoint.num_experts == 0 or goal.format in _ONE_GRID
    candidates: Candidates = _large if everything or role in ("experts", "mlp") else _small
    whole = f"layers.*.{role}.*"
    best = _best(checkpoint, goal, matrices, candidates)
    if goal.format != "gguf" and best != _AS_IT_IS:
        yield {"match": whole} | best
        return
    parts: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        match = f"layers.*.{matrix.kind.replace('experts.', 'experts.*.')}"
        parts.setdefault(match, []).append(matrix)
    found = {match: _best(checkpoint, goal, part, candidates) for match, part in parts.items()}
    if all(rule == best for rule in found.values()):
        yield {"match": whole} | best
    else:
        yield from ({"match": match} | rule for match, rule in found.items())


def _best(
    checkpoint: Checkpoint, goal: Goal, matrices: list[Matrix], candidates: Candidates
) -> Values:
    """The first candidate that all `matrices` can take."""
    refs = [checkpoint.source.tensors[matrix.tensor] for matrix in matrices]
    kinds = {(ref.shape, ref.scheme): matrix for matrix, ref in zip(matrices, refs, strict=True)}
    stored = [ref.scheme.bits if ref.scheme else None for ref in refs]
    widest = None if None in stored else max(bits for bits in stored if bits is not None)
    columns = max(ref.shape[1] for ref in refs)
    are_seen = all(map(checkpoint.family.sees_inputs, matrices))
    can_calibrate = has_tokenizer(checkpoint.source) and are_seen
    for rule in candidates(goal, widest, can_calibrate):
        if rule["method"] == "gptq" and columns > _WIDE:
            rule = rule | {"hessian_block": _HESSIAN_BLOCK}
        schemes = [_taken(checkpoint, matrix, rule, goal.format) for matrix in kinds.values()]
        if None not in schemes and (len({*schemes}) == 1 or not _must_agree(matrices[0], rule)):
            return rule
    return _AS_IT_IS


def _is_quick(checkpoint: Checkpoint, matrices: list[Matrix]) -> bool:
    """Whether two-sided rounding is for people who do not ask for it: it takes whole Hessians, on
    the CPU, and many states, and is tried with the families that have a file of their own."""
    tensors = checkpoint.source.tensors
    columns = max(tensors[matrix.tensor].shape[1] for matrix in matrices)
    is_tried = not isinstance(checkpoint.family, DerivedFamily)
    numbers = _ROWS * _row_length(checkpoint) * checkpoint.text_config.hidden_size
    fits = numbers * _STATES_BYTES <= _MEMORY_SHARE * total_bytes()
    return is_tried and fits and columns <= _WIDE and not torch.cuda.is_available()


def _has_two_sides(checkpoint: Checkpoint, matrix: Matrix) -> bool:
    """Whether two-sided rounding knows what a matrix should give."""
    family = checkpoint.family
    lone = family.lone_expert(checkpoint.config, matrix.layer)
    in_expert = matrix.expert is not None or matrix.tensor in lone.values()
    return in_expert or family.takes_aim(checkpoint.config, matrix.layer, matrix.part)


def _must_agree(matrix: Matrix, rule: Values) -> bool:
    """Whether all matrices of a role need one grid: engines take no experts of several. A group of
    all input features is another grid than the same group in a wider matrix."""
    return matrix.expert is not None and "bits" in rule


def _large(goal: Goal, stored: int | None, can_calibrate: bool) -> Iterator[Values]:
    """Rules for the matrices that hold most weights, best first; `stored` are their bits now."""
    if goal.format == "bf16":
        return
    if stored is not None and stored <= goal.width:
        yield from _copies()
    calibrated = goal.width < 8 and can_calibrate and goal.format != "bitsandbytes"
    how = EFFORTS[goal.effort] if calibrated else {"method": "rtn"}
    if goal.bits is not None:
        yield from (how | {"bits": goal.bits, "group": group} for group in _GROUPS)
        return
    yield how | {"grid": goal.grid}
    if goal.format == "gguf":
        beside = (name for name in _BESIDE_K if GRIDS[name].bits >= goal.width)
        yield from (how | {"grid": name} for name in beside)
    elif 32 in GRIDS[goal.grid].other_groups:
        yield how | {"grid": goal.grid, "group": 32}


def _small(goal: Goal, stored: int | None, can_calibrate: bool) -> Iterator[Values]:
    """Rules for matrices that are few weights and matter for every token: 8 bits, best first."""
    if goal.format == "bf16":
        return
    if stored is not None and stored <= 8:
        yield from _copies()
    if goal.format == "gguf":
        yield {"method": "rtn", "grid": "q8_0"}
        return
    yield from ({"method": "rtn", "bits": 8, "group": group} for group in _GROUPS)


def _copies() -> Iterator[Values]:
    """Lossless rules: in groups that engines load, else in the stored ones."""
    yield {"method": "copy", "group": 128}
    yield {"method": "copy"}


def _taken(checkpoint: Checkpoint, matrix: Matrix, values: Values, format: str) -> Scheme | None:
    """The grid of a matrix by the rule, None if that cannot be, or scales are not kept exactly."""
    ref = checkpoint.source.tensors[matrix.tensor]
    try:
        unit = unit_of(matrix, ref, Rule(match="*", **values), 0, FORMATS[format])
    except InputError:
        return None
    exact = ref.scheme is not None and unit.scheme.scale_dtype == ref.scheme.scale_dtype
    return unit.scheme if exact or not METHODS[unit.method].lossless else None


# --- everything else


def _text(checkpoint: Checkpoint) -> Any:
    if checkpoint.source.path == TOY_PATH:
        return CalibrationSection().text  # of which it knows a part
    return dict(_TEXTS)


def _row_length(checkpoint: Checkpoint) -> int:
    if checkpoint.source.path == TOY_PATH:
        return TOY_LENGTH
    return min(_ROW_LENGTH, checkpoint.positions)


def _place(model: str, name: str) -> str:
    """The directory in which a command leaves its result: called as the model is."""
    place = located(model)
    place = place.with_suffix("") if place.is_file() else place
    return f"{Path(published_path(os.path.abspath(place))).name}-{name}"
