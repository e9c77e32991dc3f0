"""Running a model one block at a time, its experts one matrix at a time.

The forward passes are the model's own. Every decoder layer of an empty model is replaced by a tap,
which notes what the model hands to that layer, or passes on hidden states computed elsewhere.

Experts run through transformers' experts registry, in two passes over all rows:

    pass 1   attention -> router -> experts record x, experts, gates and return zeros
             combine: every expert, one after the other, for all tokens
    pass 2   attention -> router -> experts return the outputs of combine

Where a layer only adds the experts' sum to the residual, `run_layer_over` does that itself, and
attention runs once.

So each expert is read once for all tokens, and a block needs no more memory than its attention and
one expert.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import Lock, local
from traceback import walk_tb
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from grokquant.calibration.hessian import accumulate
from grokquant.checkpoint import Checkpoint
from grokquant.devices import CPU
from grokquant.errors import InputError, said_by
from grokquant.families.family import parameter_parent, set_parameter, stored_values, tie_weights
from grokquant.families.taps import Tap
from grokquant.memory import is_exhausted
from grokquant.parallel import ALONE, Ask, Take, Team
from grokquant.streaming.lone_expert import as_lone_expert
from grokquant.threads import alone, in_order, in_pieces, slices
from grokquant.types import Guide, Matrix, Routed

STREAMED = "grokquant-streamed"  # the name of our experts in transformers' registry
# The dtype of hidden states and weights in calibration. Its products are exact in float32, in which
# Hessians add them up.
CALIBRATION_DTYPE = torch.bfloat16
# Tokens in one forward pass: large matrix products, small activations.
TOKENS_AT_ONCE = 2048
# The same for each of several threads: products are nearly as fast, and activations smaller.
TOKENS_IN_PIECE = 256
# Inputs of a matrix held at once while threads compute them: enough pieces for 32 threads.
INPUTS_AT_ONCE = 32 * TOKENS_IN_PIECE

T = TypeVar("T")
# Computes pieces of work; see `in_pieces`.
Each = Callable[[Callable[[slice], T], Iterable[slice]], list[T]]
# (inputs [tokens, hidden], experts [tokens, k], gates [tokens, k]) -> outputs [tokens, hidden]
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]
# Takes hidden states [rows, time, hidden].
Keep = Callable[[Tensor], None]
# inputs [tokens, hidden] -> outputs [tokens, hidden]
Expert = Callable[[Tensor], Tensor]
# some of the tokens routed to an expert -> its outputs [some, hidden]
Outputs = Callable[[slice], Tensor]
# (expert, what is routed to it) -> its outputs
MakeExpert = Callable[[int, Routed], Outputs]
# The same; the last one asks for what the outputs should be, given those of the stored expert.
MakeInTurn = Callable[[int, Routed, Ask], Outputs]
# Takes the outputs [part, hidden] of an expert for the tokens int64 [part].
Watch = Callable[[int, Tensor, Tensor], None]


class _Captured(Exception):
    """Ends a forward pass whose rest is not needed."""


class Place(local):
    """Where each thread is: the tokens that it works on are those from `start` on."""

    start: int = 0


@dataclass
class Exchange:
    """Carries inputs and outputs between the experts of a running block and `combine`.

    The first pass fills `recorded`, the arguments of `combine` for all `tokens`; the second one
    returns its `outputs`. `place` says which tokens the calling thread has: those from its `start`.
    """

    tokens: int
    place: Place
    recorded: tuple[Tensor, ...] = ()
    outputs: Tensor | None = None
    _first: Lock = field(default_factory=Lock)

    def __call__(self, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        part = slice(self.place.start, self.place.start + len(x))
        if self.outputs is not None:
            return self.outputs[part].to(x)
        given = (x, experts, gates)
        with self._first:
            self.recorded = self.recorded or tuple(
                t.new_empty((self.tokens, *t.shape[1:]), device=CPU) for t in given
            )
        for whole, rows in zip(self.recorded, given, strict=True):
            whole[part] = rows
        return torch.zeros_like(x)  # outputs of the first pass are without experts


def _streamed_experts(self: Any, x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    return self.exchange(x, experts, gates)


ALL_EXPERTS_FUNCTIONS.register(STREAMED, _streamed_experts)


@dataclass(frozen=True)
class Rows:
    """Token ids [rows, time] that pass the blocks together, plain text unless there are branches.

    With `branches` [rows, time], a row is several texts that begin alike. Tokens of branch 0 are
    the common beginning; those of another branch see it and their own branch only. `positions`
    [rows, time] are the positions in the text that a token belongs to:

        tokens      Paris is | a city | in France
        branches    0     0  | 1 1    | 2  2
        positions   0     1  | 2 3    | 2  3
    """

    tokens: Tensor
    branches: Tensor | None = None
    positions: Tensor | None = None

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """An additive attention mask [rows, 1, time, time]: 0 where a token sees another one.

        A token sees at most `window` tokens back, itself included; None sets no limit.
        """
        assert self.branches is not None and self.positions is not None
        back = self.positions.unsqueeze(2) - self.positions.unsqueeze(1)  # (rows, from, to)
        own = self.branches.unsqueeze(2)
        other = self.branches.unsqueeze(1)
        seen = (back >= 0) & ((own == other) | (other == 0))
        if window is not None:
            seen &= back < window
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)

    def __getitem__(self, part: slice) -> "Rows":
        return self._each(lambda t: t[part])

    def to(self, device: torch.device) -> "Rows":
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        if self.branches is None or self.positions is None:
            return Rows(change(self.tokens))
        return Rows(change(self.tokens), change(self.branches), change(self.positions))


class BlockwiseModel:
    """A checkpoint that runs block by block, computing in `dtype` on `device`.

    Hidden states are [rows, time, hidden], in main memory; all rows have the same length.
    Parameters outside the layers that equal those of `twin`, a model of the same family, are shared
    with it: embedding, head and norm of a quantized model.

    With `pieces` each thread of a CPU runs some rows by itself, so that results do not depend on
    the number of threads; hooks and experts are then called from several threads at once.

    Experts as the checkpoint holds them multiply in `products`, by default `dtype`: inputs,
    matrices and hidden units are rounded to it, and products summed in float32.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        twin: "BlockwiseModel | None" = None,
        pieces: bool = False,
        products: torch.dtype | None = None,
    ) -> None:
        shared = pieces and device.type == "cpu"
        self._each = in_pieces if shared else in_order
        self._tokens_at_once = TOKENS_IN_PIECE if shared else TOKENS_AT_ONCE
        self._inputs_at_once = INPUTS_AT_ONCE if shared else TOKENS_AT_ONCE
        self._place = Place()
        self.source = checkpoint.source
        self.family = checkpoint.family
        self.dtype = dtype
        self.products = products or dtype
        self.device = device
        self.config = deepcopy(checkpoint.config)
        self.config._experts_implementation = STREAMED
        self.config.get_text_config().use_cache = False
        self.model = self.family.empty_model(self.config, dtype)
        self.layers = self.family.layers(self.model)
        self.taps = [Tap(layer, self.family.returned) for layer in self.layers]
        self.family.set_layers(self.model, nn.ModuleList(self.taps))
        # Dense MLPs that are experts here, and the names of their matrices, by layer.
        self._lone: dict[int, tuple[nn.Module, dict[str, str]]] = {}
        self._fill_outside_layers(twin)

    def take_as_expert(self, index: int) -> None:
        """From now on, the dense MLP of layer `index` is its only expert, which gets all tokens."""
        if index in self._lone:
            return
        names = self.family.lone_expert(self.config, index)
        layer = self.layers[index]
        weight = self.family.parameter_name(layer, index, names["up"])  # mlp.up_proj.weight
        mlp = layer.get_submodule(weight.rsplit(".", 2)[0])
        as_lone_expert(mlp)
        self._lone[index] = mlp, names

    def experts_of(self, index: int) -> Any:
        """The module of a layer's experts, or None if it has none."""
        if index in self._lone:
            return self._lone[index][0]
        return self.family.experts_of(self.layers[index])

    def num_experts(self, index: int) -> int:
        return 1 if index in self._lone else self.family.num_experts(self.config, index)

    def expert_tensors(self, index: int, number: int) -> Mapping[str, str]:
        """Checkpoint names of an expert's matrices by part: gate, up, down."""
        if index in self._lone:
            return self._lone[index][1]
        return self.family.expert_tensors(index, number)

    def mixture_norm(self, index: int) -> str | None:
        """The module of a layer that the sum of its experts passes, as in its family."""
        return self.family.mlp_norm if index in self._lone else self.family.mixture_norm

    def mixture_gain(self, index: int) -> Tensor | None:
        """The gain of that norm, float32 [hidden], if there is one."""
        return self._gain(index, self.mixture_norm(index))

    def attention_gain(self, index: int) -> Tensor | None:
        """The same of the norm that the output of attention passes."""
        return self._gain(index, self.family.attention_norm)

    def _gain(self, index: int, norm: str | None) -> Tensor | None:
        if not norm:
            return None
        weight = self.layers[index].get_parameter(f"{norm}.weight").float().cpu()
        return weight + self.family.norm_offset

    def _fill_outside_layers(self, twin: "BlockwiseModel | None") -> None:
        """Reads the parameters of the model with taps: all but those of its layers."""
        others = dict(twin.model.named_parameters()) if twin else {}
        for name, value in list(stored_values(self.model)):
            self._fill(self.model, name, name)
            if not isinstance(value, nn.Parameter):
                continue
            if name in others and torch.equal(self.model.get_parameter(name), others[name]):
                set_parameter(self.model, name, others[name])
        tie_weights(self.model)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states of token ids [rows, time] that enter the first block."""
        (hidden,) = self._each(self._embed, [tokens])  # at once, for each row fills all taps
        return hidden

    def _embed(self, tokens: Tensor) -> Tensor:
        entered = []
        self._embedded = tokens
        for rows in tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
            self.model.base_model.forward(input_ids=rows.to(self.device))
            entered.append(self.taps[0].entered.cpu())
        # Once more with a single row, so that the taps keep masks that broadcast over rows. Masks
        # depend on its length only.
        single = tokens.new_zeros(1, tokens.shape[1])
        self.model.base_model.forward(input_ids=single.to(self.device))
        return torch.cat(entered)

    @cached_property
    def head_directions(self) -> Tensor:
        """The covariance of the rows of the head, times the gain of the last norm: float32 [hidden,
        hidden]."""
        tensors = self.source.tensors
        head = tensors.get("lm_head.weight") or tensors["model.embed_tokens.weight"]
        gain = tensors["model.norm.weight"].read().float() + self.family.norm_offset
        total = torch.zeros_like(gain)

        def scaled() -> Iterator[Tensor]:
            for _, rows in head.row_blocks():
                scaled = rows * gain
                total.add_(alone(partial(scaled.sum, 0)))
                yield scaled.to(CALIBRATION_DTYPE)

        gram = accumulate(scaled(), len(gain)).H
        return gram.sub_(total.outer(total).div_(head.shape[0]))

    def later_routers(self, index: int) -> Iterator[Tensor]:
        """The router of each layer after `index`, times the gain of its norm: float32 [experts,
        hidden]."""
        for later in range(index + 1, len(self.layers)):
            if names := self.family.router(self.config, later):
                tensors = self.source.tensors
                router, gain = (tensors[name].load_on(self.device).float() for name in names)
                yield router * gain

    def free_embedding(self) -> None:
        """Frees everything outside the layers; `embed` and `logits` no longer work."""
        if not self.family.by_row:  # else the layers need what it makes of each row
            nn.Module.to(self.model, "meta")

    @torch.no_grad()
    def load_layer(self, index: int) -> nn.Module:
        """Loads layer `index` but for its routed experts, which stay on the meta device."""
        layer = self.layers[index]
        prefix = self.family.module_prefix(index)
        experts = self.experts_of(index)
        theirs = set() if experts is None else {id(p) for p in experts.parameters()}
        for name, value in list(stored_values(layer)):
            if id(value) not in theirs:
                self._fill(layer, name, prefix + name)
        return layer

    def free_layer(self, index: int) -> None:
        """Frees the memory of layer `index`: its weights, and what its experts gave last."""
        layer = self.layers[index]
        experts = self.experts_of(index)
        if experts is not None:
            experts.exchange = None
        for name, value in list(stored_values(layer)):
            set_parameter(layer, name, value.to("meta"))

    def run_layer(
        self, index: int, hidden: Tensor, combine: Combine, keep: Keep | None = None
    ) -> Tensor:
        """Hidden states [rows, time, hidden] after layer `index`.

        `combine` computes its experts, if it has any; before that, `keep` is given the states after
        the layer without them. `hidden` are the rows embedded last.
        """
        return self._run_layer(index, [(None, hidden)], combine, keep)[0]

    @torch.no_grad()
    def run_layer_over(self, index: int, hidden: Tensor, combine: Combine) -> Tensor:
        """The same, for states that nobody needs any more: they may be overwritten."""
        if not self.family.ends_with_experts(self.config, index):
            return self.run_layer(index, hidden, combine)
        exchange = self._exchange(index, hidden.shape[0] * hidden.shape[1])
        assert exchange is not None
        if parts := self._run_rows(index, hidden):
            torch.cat(parts, out=hidden)
        del parts
        recorded = exchange.recorded or self._nothing_recorded([(None, hidden)])
        exchange.recorded = ()
        self._add_mixture(index, hidden, combine(*recorded))
        return hidden

    def _add_mixture(self, index: int, hidden: Tensor, outputs: Tensor) -> None:
        """Adds the experts' outputs [tokens, hidden] to the states after the rest of the layer."""
        norm = self.family.mixture_norm
        after = self.layers[index].get_submodule(norm) if norm else nn.Identity()
        states = hidden.flatten(0, 1)

        def add(part: slice) -> None:
            states[part] += after(outputs[part].to(self.device, hidden.dtype)).to(hidden.device)

        self.in_parts(add, len(states))

    def run_batches(
        self,
        index: int,
        batches: Sequence[Rows],
        hidden: Sequence[Tensor],
        combine: Combine,
        extra: int = 0,
    ) -> list[Tensor]:
        """The same for several batches of rows at once, each of a length of its own.

        The first `extra` tokens that `combine` gets are free: it fills them, and what it returns
        for them is dropped.
        """
        return self._run_layer(index, list(zip(batches, hidden, strict=True)), combine, extra=extra)

    @torch.no_grad()
    def _run_layer(
        self,
        index: int,
        batches: list[tuple[Rows | None, Tensor]],
        combine: Combine,
        keep: Keep | None = None,
        extra: int = 0,
    ) -> list[Tensor]:
        tokens = extra + sum(hidden.shape[0] * hidden.shape[1] for _, hidden in batches)
        exchange = self._exchange(index, tokens)
        if exchange is not None:
            for parts in self._run_batches(index, batches, extra):  # the first pass, which records
                if keep is not None:
                    keep(torch.cat(parts or [batches[0][1]]))
            recorded = exchange.recorded or self._nothing_recorded(batches)
            exchange.recorded = ()  # so that its memory is free before the second pass
            exchange.outputs = combine(*recorded)
            del recorded
        # A batch without rows has no parts.
        passed = self._run_batches(index, batches, extra)
        states = [
            torch.cat(parts or [hidden]) for parts, (_, hidden) in zip(passed, batches, strict=True)
        ]
        if exchange is not None:
            exchange.outputs = None  # the layer may run again before it is freed
        return states

    def _nothing_recorded(self, batches: list[tuple[Rows | None, Tensor]]) -> tuple[Tensor, ...]:
        """What experts record of no tokens at all: inputs, chosen experts, gates."""
        x = batches[0][1].flatten(0, 1)
        return x, x.new_empty(0, 1, dtype=torch.long), x.new_empty(0, 1)

    def _run_batches(
        self, index: int, batches: list[tuple[Rows | None, Tensor]], start: int
    ) -> Iterator[list[Tensor]]:
        """Yields the layer's outputs for each batch, in parts; `start` is the number of the first
        token."""
        for rows, hidden in batches:
            yield self._run_rows(index, hidden, rows, start)
            start += hidden.shape[0] * hidden.shape[1]

    @torch.no_grad()
    def inputs_of(self, index: int, tensor: str, hidden: Tensor) -> Tensor:
        """The inputs [tokens, in] of the matrix `tensor` (its checkpoint name) of layer `index`."""
        self._exchange(index, hidden.shape[0] * hidden.shape[1])  # of which only pass 1 runs
        inputs: dict[int, Tensor] = {}  # by the first of their tokens

        def capture(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[self._place.start] = args[0].flatten(0, -2).cpu()
            raise _Captured

        hook = self.linear_of(index, tensor).register_forward_pre_hook(capture)
        self._run_rows(index, hidden)
        hook.remove()
        parts = [inputs[start] for start in sorted(inputs)]
        return self._joined_inputs(tensor, parts, hidden.dtype)

    def _joined_inputs(self, tensor: str, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Inputs of a matrix in one; without any, as for cross-attention, they have no rows."""
        none = torch.empty(0, self.source.tensors[tensor].shape[1], dtype=dtype)
        return torch.cat(parts or [none])

    @torch.no_grad()
    def replace(self, index: int, tensor: str, value: Tensor) -> None:
        """Replaces the parameter of layer `index` that holds `tensor` (its checkpoint name)."""
        layer = self.layers[index]
        name = self.family.parameter_name(layer, index, tensor)
        self._set(layer, name, self.family.as_parameter(tensor, value))

    @torch.no_grad()
    def replace_expert(self, matrix: Matrix, value: Tensor) -> None:
        """Replaces a matrix [out, in] in the parameter that holds those of all experts."""
        view = self.family.expert_view(self.layers[matrix.layer], matrix)
        view.copy_(value)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [rows, time, vocabulary] from the last block's hidden states."""
        return self.logits_of(hidden.to(self.device)).cpu()

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The same on the model's device, differentiable."""
        # The tokens only give the shape: the last tap replaces what comes from them.
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        self.taps[-1].hidden = hidden
        logits = self.model(input_ids=tokens, use_cache=False).logits
        self.taps[-1].hidden = None
        return logits

    def expert_weight(self, tensor: str, dtype: torch.dtype | None = None) -> Tensor:
        """Reads one expert matrix [out, in] from the source, by default in the working dtype."""
        return self.source.tensors[tensor].load_on(self.device).to(dtype or self.dtype)

    def expert_bias(
        self, index: int, number: int, part: str, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """The bias [out] of an expert matrix, by default in the working dtype, or None."""
        if index in self._lone:
            return self.bias_of(self._lone[index][1][part], dtype)
        name = self.family.expert_biases(index, number).get(part)
        return None if name is None else self.expert_weight(name, dtype)

    def bias_of(self, tensor: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """The same of a matrix outside the experts, by its checkpoint name."""
        name = tensor.removesuffix("weight") + "bias"
        return self.expert_weight(name, dtype) if name in self.source.tensors else None

    def combine_experts(
        self,
        index: int,
        make_expert: MakeExpert,
        team: Team = ALONE,
        owners: Sequence[int] | None = None,
        watch: Watch | None = None,
        exact: int = 0,
    ) -> Combine:
        """A function that runs each expert on the tokens routed to it and adds up the outputs.

        The expert is made, and runs, where its owner among the members of `team` is; tokens go
        there and outputs come back. `watch` sees them. Where products have a dtype of their own, an
        expert is made for those of the first `exact` tokens, then for the others:

            task      0              1        2              3
            expert    0, exact       0        1, exact       1       ...
        """
        tasks = 1 if self.products == self.dtype else 2  # of each expert
        owners = [owner for owner in owners or [0] * self.num_experts(index) for _ in range(tasks)]

        def combine(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            combined, routes = self._routes(index, x, experts, gates)
            given = routes
            if tasks == 2:
                given = [part for routed in routes for part in _apart(routed, exact)]

            def add(task: int, part: slice, y: Tensor) -> None:
                if watch is not None:
                    watch(task // tasks, given[task].token[part], y)
                _add_gated(given[task], part, y)

            for task, routed, take in team.at_owners(given, owners, add):
                outputs = make_expert(task // tasks, routed)
                self._take_outputs(outputs, len(routed.token), take)
                del outputs  # frees its matrices before the next ones are read
            return combined

        return combine

    def combine_in_turn(
        self,
        index: int,
        make_expert: MakeInTurn,
        guide: Callable[[Routed], Guide],
        answer: Callable[[Routed, Tensor], Tensor],
        team: Team,
        owners: Sequence[int],
    ) -> Combine:
        """The same for experts that are made towards what those before them have left.

        An owner gets the `guide` of what is routed to its expert. It asks by the outputs of the
        stored expert; with those for their tokens and the sum of the experts before it, all members
        `answer` what its outputs should be.
        """

        def combine(x: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
            combined, routes = self._routes(index, x, experts, gates)
            given = [replace(routed, guide=guide(routed)) for routed in routes]

            def reply(expert: int, stored: Tensor) -> Tensor:
                return answer(given[expert], stored)

            def add(expert: int, part: slice, y: Tensor) -> None:
                _add_gated(given[expert], part, y)

            for expert, routed, take, ask in team.in_turn(given, owners, reply, add):
                outputs = make_expert(expert, routed, ask)
                self._take_outputs(outputs, len(routed.token), take)
                del outputs  # frees its matrices before the next ones are read
            return combined

        return combine

    def _routes(
        self, index: int, x: Tensor, experts: Tensor, gates: Tensor
    ) -> tuple[Tensor, list[Routed]]:
        """Zeros [tokens, hidden] to add outputs to, and what is routed to each expert."""
        combined = torch.zeros(x.shape, dtype=torch.float32)
        gates = gates.to(x.dtype).float()  # rounded as models round them
        routes = []
        for number in range(self.num_experts(index)):
            token, slot = torch.where(experts == number)
            routes.append(Routed(x, token, gates[token, slot].unsqueeze(1), combined))
        return combined, routes

    def combine_stored(
        self,
        index: int,
        team: Team = ALONE,
        owners: Sequence[int] | None = None,
        watch: Watch | None = None,
        exact: int = 0,
    ) -> Combine:
        """`combine_experts` for the experts as the checkpoint holds them."""
        held: dict[int, dict[str, Tensor]] = {}  # the matrices of an expert between its two tasks

        def stored(number: int, routed: Routed) -> Outputs:
            if routed.exact and not len(routed.token):
                return self.on_routed(torch.zeros_like, routed)
            dtype = self.dtype if routed.exact else self.products
            matrices = held.pop(number, None) or self._matrices(index, number, dtype)
            for part in matrices:  # one after the other, so that each is soon free
                matrices[part] = matrices[part].to(dtype)
            if routed.exact:
                held[number] = matrices
            return self.on_routed(self._expert_of(index, number, matrices), routed)

        return self.combine_experts(index, stored, team, owners, watch, exact)

    def on_routed(self, expert: Expert, routed: Routed) -> Outputs:
        """The outputs of an expert for what is routed to it."""
        return lambda part: expert(routed.x[routed.token[part]].to(self.device))

    def _take_outputs(self, outputs: Outputs, tokens: int, take: Take) -> None:
        self.in_parts(lambda part: take(part, outputs(part).cpu()), tokens)

    def in_parts(self, work: Callable[[slice], T], tokens: int) -> list[T]:
        """What `work` makes of as many tokens as run at once, for all of so many."""
        return self._each(work, slices(0, tokens, self._tokens_at_once))

    def stored_expert(self, index: int, number: int) -> Expert:
        """An expert as the checkpoint holds it; reads its three matrices."""
        return self._expert_of(index, number, self._matrices(index, number, self.dtype))

    def _matrices(self, index: int, number: int, dtype: torch.dtype) -> dict[str, Tensor]:
        names = self.expert_tensors(index, number)
        return {part: self.expert_weight(name, dtype) for part, name in names.items()}

    def _expert_of(self, index: int, number: int, matrices: dict[str, Tensor]) -> Expert:
        W_down = matrices["down"]
        dtype = W_down.dtype
        inner = self.hidden_units(index, number, matrices.get("gate"), matrices["up"])
        bias = self.expert_bias(index, number, "down", dtype)
        return lambda x: F.linear(inner(x.to(dtype)), W_down, bias).to(x.dtype)

    def attention_output(self, index: int) -> nn.Module:
        """The module of layer `index` that projects the attention's output to the residual."""
        return self.linear_of(index, self.family.attention_output(self.config, index))

    def linear_of(self, index: int, tensor: str) -> nn.Module:
        """The module of layer `index` that multiplies with a matrix, by its checkpoint name."""
        layer = self.layers[index]
        return parameter_parent(layer, self.family.parameter_name(layer, index, tensor))[0]

    def hidden_units(self, index: int, number: int, W_gate: Tensor | None, W_up: Tensor) -> Expert:
        """The part of an expert before its down projection: [tokens, hidden] to [tokens, inner]."""
        gate_bias, up_bias = (
            self.expert_bias(index, number, part, W_up.dtype) for part in ("gate", "up")
        )
        experts = self.experts_of(index)

        def inner(x: Tensor) -> Tensor:
            up = F.linear(x, W_up, up_bias)
            if W_gate is None:
                return experts.act_fn(up)
            gate = F.linear(x, W_gate, gate_bias)
            return experts._apply_gate(self.family.join(gate, up))

        return inner

    def slopes(
        self, index: int, number: int, gate: Tensor, up: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Derivatives float32 [tokens, some] of an expert's hidden units by their gate and up,
        float32 products of some rows of its matrices with inputs."""
        biases = (self.expert_bias(index, number, part) for part in ("gate", "up"))
        experts = self.experts_of(index)
        with torch.enable_grad():
            inputs = [
                (Y if bias is None else Y + bias[rows].float()).requires_grad_()
                for Y, bias in zip((gate, up), biases, strict=True)
            ]
            units = experts._apply_gate(self.family.join(*inputs))
            by_gate, by_up = torch.autograd.grad(units.sum(), inputs)
        return by_gate, by_up

    def rows_at_once(self, time: int) -> int:
        """Rows of this length in one forward pass, whose outputs may depend on their number."""
        return max(1, self._tokens_at_once // time)

    def inputs_at_once(self, x: Tensor) -> Iterator[Tensor]:
        """Parts of x [tokens, ...], as `by_rows` can take them; none if it is empty."""
        yield from x.split(self._inputs_at_once) if len(x) else ()

    def reader_of(self, x: Tensor, rows: Tensor | None = None) -> Callable[[], Iterator[Tensor]]:
        """Reads x [tokens, ...], or its `rows` int64, some at a time on the model's device."""
        if rows is None:
            return lambda: (part.to(self.device) for part in self.inputs_at_once(x))
        return lambda: (x[part].to(self.device) for part in self.inputs_at_once(rows))

    def by_rows(self, function: Expert, x: Tensor) -> Tensor:
        """What `function` makes of x [tokens, hidden], some rows at a time."""
        return torch.cat(self._each(function, x.split(self._tokens_at_once)))

    @staticmethod
    def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Splits tensors of the same number of rows alike; yields nothing if they have none."""
        yield from zip(*(t.split(TOKENS_AT_ONCE) for t in tensors if len(t)), strict=True)

    def _exchange(self, index: int, tokens: int) -> Exchange | None:
        """Gives the experts of a layer a new exchange; None if it is dense."""
        experts = self.experts_of(index)
        if experts is None:
            return None
        experts.exchange = Exchange(tokens, self._place)
        return experts.exchange

    def _run_rows(
        self, index: int, hidden: Tensor, rows: Rows | None = None, start: int = 0
    ) -> list[Tensor]:
        """The layer's outputs, some rows in each part. `rows` default to the last embedded; `start`
        is the number of their first token."""
        if self.family.by_row and rows is None:
            rows = Rows(self._embedded)

        def run(part: slice, first: int) -> Tensor:
            if rows is not None:
                self._note_arguments(rows[part].to(self.device))
            given = hidden[part].to(self.device)
            return self.run_part(index, given, start + first).to(hidden.device)

        # All threads share the taps.
        return self.each_part(run, hidden, in_order if rows is not None else self._each)

    def each_part(
        self, work: Callable[[slice, int], T], hidden: Tensor, each: Each | None = None
    ) -> list[T]:
        """What `work` makes of parts of hidden [rows, time, hidden] and the number of the first
        token of each."""
        time = hidden.shape[1]
        parts = slices(0, len(hidden), self.rows_at_once(time))
        return (each or self._each)(lambda part: work(part, part.start * time), parts)

    def run_part(self, index: int, hidden: Tensor, first: int) -> Tensor:
        """The outputs of layer `index` for some rows, whose first token has the number `first`."""
        self._place.start = first
        args, kwargs = self.taps[index].arguments
        try:
            out = self.layers[index](hidden, *args, **kwargs)
        except _Captured:
            return hidden
        except RuntimeError as error:
            if is_exhausted(error) or not _is_of_transformers(error):
                raise
            dtype = str(self.dtype).removeprefix("torch.")
            raise InputError(
                f"layer {index}: the code of {self.family.name} in transformers does not run in "
                f"{dtype} on rows of {hidden.shape[1]} tokens ({said_by(error)}); method rtn does "
                "not run it"
            ) from None
        # Layers of some models return a tuple that begins with the hidden states.
        return out[0] if isinstance(out, tuple | list) else out

    def _note_arguments(self, rows: Rows) -> None:
        """Has the taps note what the model hands to its layers for these rows."""
        if rows.branches is None:
            # Masks and positions of plain text depend on its length only, so one row will do.
            tokens = rows.tokens if self.family.by_row else rows.tokens[:1]
            self.model.base_model.forward(input_ids=tokens)
            return
        window = getattr(self.config, "sliding_window", None) or None
        mask: Any = rows.mask(window, self.dtype)
        if getattr(self.config, "layer_types", None):
            mask = {"sliding_attention": mask, "full_attention": rows.mask(None, self.dtype)}
        self.model.base_model.forward(
            input_ids=rows.tokens, attention_mask=mask, position_ids=rows.positions
        )

    def _fill(self, module: nn.Module, name: str, whole: str) -> None:
        """Reads the parameter `name` of a module, which the model calls `whole`."""
        self._set(module, name, self.family.read(self.source.tensors, whole))

    def _set(self, module: nn.Module, name: str, value: Tensor) -> None:
        dtype = self.family.working_dtype(name, self.dtype) if value.is_floating_point() else None
        set_parameter(module, name, value.to(self.device, dtype))


def _is_of_transformers(error: Exception) -> bool:
    """Whether an error comes from the code of a model, and not from ours below it."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("transformers.models.")


def _add_gated(routed: Routed, part: slice, y: Tensor) -> None:
    """Adds outputs y of an expert for some of its tokens to those of the experts before it."""
    gated = y.float() * routed.gate[part]
    routed.combined.index_add_(0, routed.token[part], gated)


def _apart(routed: Routed, exact: int) -> list[Routed]:
    """Those of the first `exact` tokens that are routed to an expert, and the others."""
    count = int((routed.token < exact).sum())
    first, others = slice(0, count), slice(count, None)
    return [
        replace(routed, token=routed.token[first], gate=routed.gate[first], exact=True),
        replace(routed, token=routed.token[others], gate=routed.gate[others]),
    ]
