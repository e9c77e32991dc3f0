"""Trains a small model to measure on, with experts or dense, on text of this Python installation.

    python eval/bench/train_moe.py OUTPUT [--family NAME] [--size N] [--steps N] [--seed N]

Writes OUTPUT as transformers saves a model, and two texts of other domains than the training and
calibration text: `code.txt`, source files of installed packages, and `prose.txt`, their READMEs
and licences. Equal arguments give equal weights on one machine with one number of threads. Prints
a JSON line: the perplexity of each text beside that of its token frequencies, and each layer's
least share of choices that an expert gets. The tokenizer, the loop and most of the text are those
of `train_toy.py`, which takes half an hour of one core for size 8 and 2000 steps.
"""

import argparse
import ast
import json
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # where train_toy is

import train_toy

from grokquant.families.grok_model import Grok1Config
from grokquant.text import python_docs

# Hidden features, features of an expert and layers, by millions of weights. All are multiples of
# 256, which llama.cpp's blocks need.
SIZES = {5: (256, 256, 2), 8: (256, 256, 4), 15: (256, 512, 4), 60: (512, 512, 8)}
EXPERTS, CHOSEN, HEAD, KEY_HEADS = 8, 2, 64, 2
CODE_CHARACTERS, TEST_CHARACTERS, FILE_CHARACTERS = 8_000_000, 400_000, 20_000
# Files of a package that are about it, and not code.
PROSE = ("METADATA", "README*", "LICENSE*", "COPYING*", "*.rst", "*.md")


def mixtral(sizes: dict, inner: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    chosen = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
    return _eager(MixtralForCausalLM(MixtralConfig(**sizes, **chosen, intermediate_size=inner)))


def qwen3_moe(sizes: dict, inner: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    chosen = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "norm_topk_prob": True}
    widths = {"moe_intermediate_size": inner, "intermediate_size": inner}
    return _eager(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **chosen, **widths)))


def llama(sizes: dict, inner: int, seed: int) -> PreTrainedModel:
    """A dense model: as wide as three experts."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=3 * inner))


def grok(sizes: dict, inner: int, seed: int) -> PreTrainedModel:
    config = train_toy.CONFIG.to_dict() | sizes | {"intermediate_size": inner}
    return _eager(train_toy.new_model(Grok1Config(**config), seed))


def _eager(model: PreTrainedModel) -> PreTrainedModel:
    """With experts that run one after the other."""
    model.set_experts_implementation("eager")
    return model


FAMILIES: dict[str, Callable[[dict, int, int], PreTrainedModel]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "grok": grok,
    "llama": llama,
}


def new_model(family: str, size: int, seed: int) -> PreTrainedModel:
    hidden, inner, layers = SIZES[size]
    sizes = {
        "vocab_size": train_toy.VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return FAMILIES[family](sizes, inner, seed)


def package_files(part: python_docs.Part, *patterns: str) -> Iterator[str]:
    """Texts of the installed packages of this part, in an order that mixes packages."""
    root = Path(sysconfig.get_path("purelib"))
    paths = {path for pattern in patterns for path in root.rglob(pattern) if path.is_file()}
    names = {path.relative_to(root).as_posix(): path for path in paths}
    for name in sorted(names, key=python_docs.digest):
        # `torch-2.9.dist-info` is torch, too: a package is in one part with all that is about it.
        package = name.split("/")[0].split("-")[0].lower()
        if python_docs.part_of(f"package:{package}") == part and "/tests/" not in name:
            yield names[name].read_text("utf-8", errors="ignore")[:FILE_CHARACTERS]


def joined(texts: Iterator[str], characters: int) -> str:
    """Texts one after the other, without paragraphs that came before, up to so many characters."""
    seen: set[str] = set()
    kept: list[str] = []
    length = 0
    for text in texts:
        fresh = python_docs.unseen_paragraphs(text, seen)
        kept.append(fresh)
        length += len(fresh)
        if length > characters:
            break
    return "\n\n".join(kept)[:characters] + "\n"


def train_code() -> list[str]:
    """The standard library's code, and that of the packages of the train part, without comments."""
    return [*train_toy.train_code(), joined(_unparsed(), CODE_CHARACTERS)]


def _unparsed() -> Iterator[str]:
    for text in package_files("train", "*.py"):
        try:
            yield ast.unparse(train_toy._without_docstrings(ast.parse(text)))
        except (SyntaxError, ValueError):  # cut off, or of another version
            continue


def test_texts() -> dict[str, str]:
    """The two domains, of packages whose code was not trained on."""
    code = joined(package_files("heldout", "*.py"), TEST_CHARACTERS)
    about = (text for part in ("heldout", "calibration") for text in package_files(part, *PROSE))
    return {"code": code, "prose": joined(about, TEST_CHARACTERS)}


@torch.no_grad()
def least_shares(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """Of each layer, the share of choices that its least chosen expert gets."""
    balance = train_toy.RouterBalance(model)
    model.eval()
    model(windows, use_cache=False)
    shares = []
    for logits in balance.logits:
        chosen = logits.topk(CHOSEN).indices.flatten()
        load = torch.bincount(chosen, minlength=EXPERTS) / len(chosen)
        shares.append(round(load.min().item(), 4))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="mixtral")
    parser.add_argument("--size", type=int, choices=SIZES, default=15)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    docs = python_docs.documents("train")
    tokenizer = train_toy.train_tokenizer(docs, options.output / "tokenizer")
    texts = test_texts()
    for name, text in texts.items():
        (options.output / f"{name}.txt").write_text(text)
    docs_tokens, code_tokens, heldout = (
        torch.tensor([token for text in documents for token in tokenizer.encode(text)])
        for documents in (docs, train_code(), python_docs.documents("heldout"))
    )
    print(f"{len(docs_tokens)} + {len(code_tokens)} train tokens", flush=True)
    model = new_model(options.family, options.size, options.seed)
    batches = train_toy.Batches(docs_tokens, code_tokens, options.seed)
    train_toy.train(model, batches, heldout, options.steps)
    tested = {name: torch.tensor(tokenizer.encode(text)) for name, text in texts.items()}
    found = {
        "weights": model.num_parameters(),
        "least_shares": least_shares(model, heldout[: 64 * 256].view(64, 256)),
    }
    balance = train_toy.RouterBalance(model)
    for name, tokens in {"heldout": heldout, **tested}.items():
        found[name] = {
            "perplexity": math.exp(train_toy.heldout_loss(model, tokens, balance)),
            "unigram": train_toy.unigram_perplexity(docs_tokens, tokens),
        }
    model.bfloat16().save_pretrained(options.output)
    print(json.dumps({"bench": "train_moe"} | vars(options) | found, default=str))


if __name__ == "__main__":
    main()
