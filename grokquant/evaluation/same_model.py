"""Whether a reference is the model that a quantized model was made from."""

from collections.abc import Iterator
from dataclasses import dataclass

from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.job.shards import is_result
from grokquant.job.source_model import (
    ModelFingerprint,
    fingerprint_of,
    kept_fingerprint_of,
    recorded_models,
)

_NAMED = 3  # differences in one line
_LONGEST = 100  # characters of a value in it


@dataclass(frozen=True)
class OtherModel:
    """What tells a reference from the source, in words; `certain` if it is another model."""

    differences: str
    certain: bool

    @property
    def note(self) -> str:
        verb = "is" if self.certain else "may be"
        return f"The reference {verb} another model than the source: {self.differences}."


def check_same_model(
    quantized: Checkpoint, reference: Checkpoint, any_reference: bool
) -> str | None:
    """A line for the report where the reference is, or may be, another model than the source.

    Raises InputError that names the differences where it surely is one, unless `any_reference`.
    """
    other = other_model(quantized, reference)
    if other is None:
        return None
    if other.certain and not any_reference:
        raise InputError(
            f"needed to compare {quantized.source.path} with {reference.source.path}, which it "
            f"was not made from: {other.differences}",
            "any_reference",
        )
    return other.note


def other_model(quantized: Checkpoint, reference: Checkpoint) -> OtherModel | None:
    """What tells the reference from the source of `quantized`; None if nothing does.

    A result names the models that it was made from, any of which may be the reference.
    """
    theirs = fingerprint_of(reference)
    known = recorded_models(quantized.source.path)
    if not known:
        return _told_by_what_was_kept(quantized, theirs)
    nearest = min((list(differences(model, theirs)) for model in known), key=len)
    return OtherModel(_joined(nearest), certain=True) if nearest else None


def _told_by_what_was_kept(quantized: Checkpoint, theirs: ModelFingerprint) -> OtherModel | None:
    """The same by the tensors that quantization usually leaves as they are.

    Ours are all equal to the source's. Some methods of other tools change a part of theirs; where
    none is equal, it is another model.
    """
    own = kept_fingerprint_of(quantized)
    found = list(differences(own, theirs))
    if not found:
        return None
    ours = is_result(quantized.source.path)
    explained = len(found) == 1 and _differ_in_part(own, theirs)
    return OtherModel(_joined(found), certain=ours or not explained)


def differences(own: ModelFingerprint, theirs: ModelFingerprint) -> Iterator[str]:
    """What tells two models apart, with the values of both; only what both say is compared."""
    if own.family != theirs.family:
        yield f"family is {own.family[:_LONGEST]}, the reference has {theirs.family}"
    for key in own.config:
        if key in theirs.config and own.config[key] != theirs.config[key]:
            values = (str(config[key])[:_LONGEST] for config in (own.config, theirs.config))
            yield f"{key} is {next(values)}, the reference has {next(values)}"
    if own.tokenizer and theirs.tokenizer and own.tokenizer.sha256 != theirs.tokenizer.sha256:
        yield f"the tokenizer is {own.tokenizer}, the reference has {theirs.tokenizer}"
    if changed := _changed(own, theirs):
        shared = own.tensors.keys() & theirs.tensors.keys()
        name = changed[0]
        yield (
            f"{len(changed)} of {len(shared)} sampled tensors have other values, such as "
            f"{name[:_LONGEST]} (checksum {own.tensors[name][:_LONGEST]}, "
            f"the reference has {theirs.tensors[name]})"
        )


def _differ_in_part(own: ModelFingerprint, theirs: ModelFingerprint) -> bool:
    """Whether some of the sampled tensors differ and some are equal."""
    shared = own.tensors.keys() & theirs.tensors.keys()
    return 0 < len(_changed(own, theirs)) < len(shared)


def _changed(own: ModelFingerprint, theirs: ModelFingerprint) -> list[str]:
    both = (name for name in own.tensors if name in theirs.tensors)
    return [name for name in both if own.tensors[name] != theirs.tensors[name]]


def _joined(found: list[str]) -> str:
    more = len(found) - _NAMED
    named = "; ".join(found[:_NAMED])
    return f"{named}; and {more} more" if more > 0 else named
