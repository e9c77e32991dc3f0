"""Trains the embedded toy on the text of this Python installation and writes it as a release.

    python eval/train_toy.py OUTPUT [--steps 2000]

Takes about half an hour of one core. The tokenizer is trained first; the text is the train part of
`python_docs` plus the code (docstrings removed) of the same modules, so that the calibration and
held-out documents stay unseen.
"""

import argparse
import ast
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grokquant.families.grok_model import Grok1Config, Grok1ForCausalLM
from grokquant.sources.release import LAYER, TOP, leaf_names
from grokquant.text import python_docs
from grokquant.toy.release_writer import Leaf, quantize_leaf, write_release

VOCABULARY, WINDOW, BATCH = 2048, 256, 16
DOCS_SHARE = 0.6  # of the windows of a batch; the rest is code
# Row-parallel matrices of the release carry a scale per eighth of their rows.
GROUPED, SCALE_GROUPS = ("moe/linear_1", "multi_head_attention/linear"), 8
PEAK_LR, BALANCE_WEIGHT, WEIGHT_DECAY, DROPOUT = 3e-3, 0.01, 0.1, 0.1

CONFIG = Grok1Config(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=8,
    num_experts_per_tok=2,
    attn_output_multiplier=1 / 8,
    embedding_multiplier_scale=16.0,
    output_multiplier_scale=1 / math.sqrt(3),
    max_position_embeddings=2048,
)


def train_tokenizer(documents: list[str], prefix: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE with byte fallback and the ids of Grok-1's special tokens."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n\n", "\n", *(" " * n for n in (8, 4, 3, 2))],
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        max_sentence_length=100_000,
        num_threads=1,
        minloglevel=2,
    )
    prefix.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def train_code() -> list[str]:
    """Code of the standard-library modules whose docstrings are in the train part."""
    root = Path(sysconfig.get_path("stdlib"))
    names = {f"module:{p.relative_to(root).as_posix()}": p for p in sorted(root.rglob("*.py"))}
    texts = []
    for name, path in names.items():
        if python_docs.is_covered(path.relative_to(root)) and python_docs.part_of(name) == "train":
            try:
                texts.append(ast.unparse(_without_docstrings(ast.parse(path.read_bytes()))) + "\n")
            except (SyntaxError, ValueError):
                continue
    return texts


def _without_docstrings(tree: ast.Module) -> ast.Module:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


class Batches:
    """Random windows: `DOCS_SHARE` of each batch from the documentation, the rest from code."""

    def __init__(self, docs: Tensor, code: Tensor, seed: int = 0) -> None:
        self.docs, self.code = docs, code
        self.random = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        from_docs = round(BATCH * DOCS_SHARE)
        return torch.cat([self._cut(self.docs, from_docs), self._cut(self.code, BATCH - from_docs)])

    def _cut(self, tokens: Tensor, count: int) -> Tensor:
        starts = torch.randint(len(tokens) - WINDOW - 1, (count, 1), generator=self.random)
        return tokens[starts + torch.arange(WINDOW + 1)]  # (count, WINDOW + 1)


class RouterBalance:
    """Collects router logits of a forward pass for the load-balancing loss (Switch, eq. 4)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.logits: list[Tensor] = []
        for module in model.modules():
            if type(module).__name__.endswith("Router"):  # of Grok and of transformers' families
                module.register_forward_hook(lambda _m, _i, out: self.logits.append(out[0]))
                self.top_k = module.top_k

    def loss(self) -> Tensor:
        terms = []
        for logits in self.logits:
            probabilities = logits.softmax(-1)
            experts = probabilities.shape[-1]
            chosen = probabilities.topk(self.top_k).indices.flatten()
            load = torch.bincount(chosen, minlength=experts) / len(chosen)
            terms.append(experts * (load * probabilities.mean(0)).sum())
        self.logits.clear()
        return torch.stack(terms).mean() if terms else torch.zeros(())  # of a dense model


def new_model(config: Grok1Config = CONFIG, seed: int = 0) -> Grok1ForCausalLM:
    torch.manual_seed(seed)
    model = Grok1ForCausalLM(config)
    model.set_experts_implementation("eager")
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1 / 16)
    for name, parameter in model.named_parameters():
        if name.endswith(("post_attn_norm.weight", "post_moe_norm.weight")):
            torch.nn.init.constant_(parameter, 0.35)
    return model


def add_dropout(model: PreTrainedModel) -> None:
    """Drops some of what each sub-block adds: the text is read several times over."""
    for name, module in model.named_modules():
        if name.endswith(("post_attn_norm", "post_moe_norm")):
            module.register_forward_hook(lambda m, _, out: F.dropout(out, DROPOUT, m.training))


def loss_of(model: PreTrainedModel, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, tokens: Tensor, balance: RouterBalance) -> float:
    count = min((len(tokens) - 1) // WINDOW, 64)
    windows = tokens[torch.arange(count)[:, None] * WINDOW + torch.arange(WINDOW + 1)]
    model.eval()
    losses = [loss_of(model, part) for part in windows.split(16)]
    model.train()
    balance.logits.clear()
    return torch.stack(losses).mean().item()


def train(model: PreTrainedModel, batches: Batches, heldout: Tensor, steps: int) -> None:
    """AdamW with a short warm-up, then a cosine down to 2 % of the peak rate."""
    balance = RouterBalance(model)
    add_dropout(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    model.train()
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0},
        ],
        betas=(0.9, 0.98),
    )
    for step in range(1, steps + 1):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        rate = PEAK_LR * min(step / 100, 0.02 + 0.98 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batches.next())
            total = loss + BALANCE_WEIGHT * balance.loss()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            held = heldout_loss(model, heldout, balance)
            words = f"loss {loss:.3f}, held-out perplexity {math.exp(held):.2f}"
            print(f"step {step} of {steps}: {words}", flush=True)


def release_leaves(model: Grok1ForCausalLM) -> Iterator[tuple[str, Leaf]]:
    """The model's tensors under the release's names, matrices as int8 with bf16 scales."""
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    for name in leaf_names(CONFIG.num_hidden_layers):
        if name in TOP:
            yield name, state[TOP[name].tensor]
            continue
        layer, slot = name.removeprefix("transformer/decoder_layer_").split("/", 1)
        leaf = LAYER[slot]
        value = _stored(state, f"model.layers.{layer}.{leaf.tensor}")
        groups = SCALE_GROUPS if slot in GROUPED else 1
        yield name, quantize_leaf(value, groups) if leaf.quantized else value


def _stored(state: dict[str, Tensor], tensor: str) -> Tensor:
    """A tensor as the release stores it: [in, out], experts stacked in front."""
    if ".experts.{expert}." not in tensor:
        return state[tensor].T if state[tensor].ndim == 2 else state[tensor]
    experts, part = tensor.removesuffix(".weight").split(".{expert}.")
    if part == "w2":
        return state[f"{experts}.down_proj"].transpose(1, 2)
    gate, up = state[f"{experts}.gate_up_proj"].transpose(1, 2).chunk(2, dim=-1)
    return gate if part == "w1" else up


def release_config() -> dict:
    """The fields that a config.json beside ckpt-0 carries."""
    names = (
        "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers "
        "num_attention_heads num_key_value_heads head_dim num_local_experts num_experts_per_tok "
        "attn_output_multiplier attn_logit_softcapping embedding_multiplier_scale "
        "output_multiplier_scale rms_norm_eps rope_theta max_position_embeddings "
        "pad_token_id bos_token_id eos_token_id tie_word_embeddings"
    )
    fields = CONFIG.to_dict() | {"architectures": ["Grok1ForCausalLM"]}
    return {name: fields[name] for name in names.split()}


def unigram_perplexity(train_tokens: Tensor, heldout: Tensor) -> float:
    """Held-out perplexity of smoothed token frequencies: what the toy is measured against."""
    counts = torch.bincount(train_tokens, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[heldout].mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    docs = python_docs.documents("train")
    tokenizer = train_tokenizer(docs, arguments.output / "tokenizer")
    docs_tokens, code_tokens, heldout = (
        torch.tensor([token for text in texts for token in tokenizer.encode(text)])
        for texts in (docs, train_code(), python_docs.documents("heldout"))
    )
    print(f"{len(docs_tokens)} + {len(code_tokens)} train tokens, {len(heldout)} held-out")
    print(f"unigram held-out ppl {unigram_perplexity(docs_tokens, heldout):.1f}", flush=True)
    model = new_model()
    train(model, Batches(docs_tokens, code_tokens), heldout, arguments.steps)
    write_release(arguments.output, release_config(), release_leaves(model))


if __name__ == "__main__":
    main()
