"""Fixtures that several test modules share."""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from os.path import relpath
from pathlib import Path

import pytest
import torch
from jobs import Job, Launcher, new_job
from make_release import write_random_release
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import grokquant
from grokquant.files.atomic import sha256
from grokquant.grids import Scheme
from grokquant.methods import METHODS
from grokquant.recipe import Recipe, load_recipe, parse_recipe
from grokquant.reporting.signs_of_life import VARIABLE
from grokquant.streaming.blocks import BlockwiseModel
from grokquant.toy import TOY_PATH
from grokquant.types import Matrix, Unit

# As they were before any test.
_HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

EXPERTS = {"match": "layers.*.experts.*.*", "method": "gptq", "bits": 4, "group": 32}
# Every integer grid that a recipe can ask for.
SCHEMES = [
    Scheme(bits, group, symmetric, dtype)
    for bits in (4, 8)
    for group in (32, 64, 128, None)
    for symmetric in (True, False)
    for dtype in ("bfloat16", "float16")
]
ATTENTION = {"match": "layers.*.attention.*", "method": "copy"}


def unit_of(
    tensor: str,
    scheme: Scheme,
    shape: tuple[int, int] = (64, 256),
    method: str = "rtn",
    settings: object = None,
) -> Unit:
    """A unit of layer 0 outside the experts, named after its tensor."""
    place = Matrix(tensor, tensor, layer=0, part=tensor, reads=tensor)
    settings = METHODS[method].settings() if settings is None else settings
    return Unit(**vars(place), shape=shape, scheme=scheme, method=method, settings=settings, rule=0)


def run_stored_layer(model: BlockwiseModel, index: int, hidden: Tensor) -> Tensor:
    """Outputs of layer `index` for `hidden`, with its experts as the checkpoint has them."""
    return model.run_layer(index, hidden, model.combine_stored(index))


def own_text(output: Path) -> str:
    """The text that the recipe in a result names for its evaluation."""
    return load_recipe(output / "recipe.yaml").eval.text


def seal(output: Path) -> None:
    """SHA256SUMS of what is there, as a forger would write it."""
    free = {"SHA256SUMS", "README.md"}
    files = sorted(p for p in output.iterdir() if p.is_file() and p.name not in free)
    (output / "SHA256SUMS").write_text("".join(f"{sha256(p)}  {p.name}\n" for p in files))


def saved_model(place: Path, family: str, **sizes: object) -> Path:
    """A random model in bf16 as transformers saves it, with the toy's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
    shutil.copyfile(TOY_PATH / "tokenizer.model", place / "tokenizer.model")
    return place


@pytest.fixture(autouse=True)
def signal_handlers() -> None:
    """The command sets its own for the whole process, where lm-eval forks workers that would keep
    them: a worker that loses the exception of a handler never ends."""
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def no_signs_of_life() -> Iterator[None]:
    """Commands, in processes of their own too, say nothing that depends on their speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1e6")
        yield


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory) -> Path:
    """A random Grok in the release's layout, with the toy's tokenizer and vocabulary."""
    directory = tmp_path_factory.mktemp("tiny")
    write_random_release(
        directory, layers=2, hidden=128, ffn=256, heads=2, kv_heads=1, head_dim=64, vocab=2048
    )
    shutil.copyfile(TOY_PATH / "tokenizer.model", directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def int4(tiny_release, tmp_path_factory) -> Path:
    """The tiny release rounded without data; each module has its own."""
    return grokquant.quantize(
        {
            "model": {"path": str(tiny_release)},
            "quantize": [EXPERTS | {"method": "rtn"}, ATTENTION],
            "output": {"path": str(tmp_path_factory.mktemp("out") / "int4")},
        }
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text of a few thousand tokens, so that no test waits for the standard library's."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(0)
    words = [
        "".join(draw.choices("abcdefghilmnoprstuvy", k=draw.randint(2, 8))) for _ in range(500)
    ]
    path.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(400)))
    return path


@pytest.fixture
def tiny_recipe(tiny_release, text_file, tmp_path):
    """A recipe for the tiny release; keyword arguments replace its sections."""

    def make(*rules: dict, **sections: object) -> Recipe:
        values = {
            "model": {"path": str(tiny_release)},
            "calibration": {"text": str(text_file), "samples": 16, "length": 64},
            "quantize": list(rules) or [EXPERTS, ATTENTION],
            "output": {"path": str(tmp_path / "out")},
            "eval": {"text": relpath(text_file), "samples": 4, "length": 64},
        }
        return parse_recipe(values | sections)

    return make


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def smallest_release(tmp_path_factory) -> Path:
    """A release that a run of a second quantizes, into a dozen files."""
    directory = tmp_path_factory.mktemp("smallest")
    write_random_release(directory, layers=2, vocab=2048)
    shutil.copyfile(TOY_PATH / "tokenizer.model", directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="session")
def jobs(launcher, smallest_release, text_file, tmp_path_factory) -> Callable[[str], Job]:
    """The run of a kind ("gptq" or "rtn") in an empty directory, its steps and outcome known."""
    known: dict[str, Job] = {}

    def make(kind: str) -> Job:
        if kind not in known:
            known[kind] = job = new_job(
                launcher, tmp_path_factory.mktemp(kind), smallest_release, text_file, kind
            )
            launcher.ask(warm=str(job.recipe))
            job.learn()
        known[kind].clear()
        return known[kind]

    return make


@pytest.fixture
def own_job(launcher, smallest_release, text_file, tmp_path) -> Job:
    """A run by gptq whose source and text can be changed; nothing is known of it."""
    shutil.copytree(smallest_release, tmp_path / "source")
    shutil.copyfile(text_file, tmp_path / "text.txt")
    job = new_job(launcher, tmp_path / "home", tmp_path / "source", tmp_path / "text.txt", "gptq")
    job.clear()
    return job
