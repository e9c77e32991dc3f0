"""The benchmark programs: what they measure on is shaped like the release."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_toy
from make_release import framed_size

import grokquant
from grokquant.checkpoint import open_checkpoint
from grokquant.families.grok_model import Grok1Config
from grokquant.grids import Scheme
from grokquant.methods import two_sided
from grokquant.sources.release import LAYER, TOP, leaf_names
from grokquant.toy import TOY_PATH
from grokquant.toy.release_writer import Chunked, write_leaf

BENCH = Path(__file__).parents[1] / "eval" / "bench"
SMALL = dict(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    embedding_multiplier_scale=8.0,
)
# Bytes of the real files; every norm has 24727.
SIZES = {
    "language_model/in_out_embed": 3_221_225_637,
    "moe/linear": 1_611_137_347,
    "moe/linear_1": 1_611_399_491,
    "moe/linear_v": 1_611_137_347,
    "multi_head_attention/key": 6_293_814,
    "multi_head_attention/linear": 37_847_359,
    "multi_head_attention/query": 37_761_334,
    "multi_head_attention/value": 6_293_814,
    "router": 196_770,
}


def load(name: str):
    """A program of eval/bench as a module; the tests have a make_release of their own."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    load("make_release").write_random_grok(directory, Grok1Config(**SMALL))
    return directory


def run_program(name: str, *arguments: object) -> list[dict]:
    """The JSON lines that a program of eval/bench prints."""
    command = [sys.executable, BENCH / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def file_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("ckpt-0/*"))}


def test_leaves_have_the_sizes_of_the_real_files():
    program = load("make_release")
    for name in leaf_names(1):
        slot = name if name in TOP else name.split("/", 2)[2]
        leaf = (TOP | LAYER)[slot]
        sizes = program._sizes(Grok1Config(num_hidden_layers=1))
        shape = tuple(sizes[letter] for letter in leaf.dimensions)
        scales = (*shape[:-2], program.GROUPS.get(slot, 1), shape[-1]) if leaf.quantized else None
        assert framed_size(shape, scales) == SIZES.get(slot, 24_727), slot


def test_the_release_opens_and_weights_look_trained(small):
    checkpoint = open_checkpoint(small)
    assert checkpoint.config.num_hidden_layers == 2
    assert checkpoint.source.tokenizer_files
    for name, ref in checkpoint.units():
        quantized = ref.read_quantized()
        grouped = quantized.codes.float().view(*quantized.scales.shape, -1)
        assert (grouped.abs().amax(-1) == 127).all(), name
        weights = quantized.dequantize().float()
        spread = weights.std(1).log().std()
        assert 0.15 < spread < 0.6, name
    standard = weights / weights.std(1, keepdim=True)
    assert standard.pow(4).mean() > 3.2  # heavier tails than a normal distribution's
    embedding = checkpoint.source.tensors["model.embed_tokens.weight"].read()
    assert embedding.square().mean().sqrt().item() == pytest.approx(1 / 8, rel=0.05)


def test_no_two_matrices_are_equal(small):
    tensors = [ref.read_quantized() for _, ref in open_checkpoint(small).units()]
    assert len({bytes(tensor.codes.numpy()) for tensor in tensors}) == len(tensors)
    assert len({bytes(tensor.scales.view(torch.int16).numpy()) for tensor in tensors}) == len(
        tensors
    )


def test_a_seed_gives_the_same_bytes_and_another_one_others(small, tmp_path):
    program = load("make_release")
    program.write_random_grok(tmp_path / "again", Grok1Config(**SMALL))
    program.write_random_grok(tmp_path / "other", Grok1Config(**SMALL), seed=1)
    first, again, other = map(file_bytes, (small, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_chunks_are_written_as_the_whole(tmp_path):
    whole = torch.arange(70_000, dtype=torch.float32).view(100, 700)
    write_leaf(tmp_path / "whole", whole)
    write_leaf(tmp_path / "parts", Chunked(torch.float32, (100, 700), whole.split(33)))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    for rows, length in ((whole[:99], "-2800"), (torch.cat((whole, whole[:1])), "2800")):
        with pytest.raises(ValueError, match=f"are {length} bytes too long"):
            write_leaf(tmp_path / "wrong", Chunked(torch.float32, (100, 700), rows.split(33)))
        assert not (tmp_path / "wrong").exists()


def test_a_command_is_measured():
    measure = load("measure")
    program = "import time; block = bytearray(10**8); print(len(block)); time.sleep(0.4)"
    found = measure.run([sys.executable, "-c", program])
    assert found.stdout == "100000000\n"
    assert 0.4 < found.seconds < 30
    assert 10**8 < found.peak_anonymous <= found.peak_rss < 2 * 10**8
    with pytest.raises(subprocess.CalledProcessError):
        measure.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_conditions_name_machine_and_versions():
    conditions = load("measure").conditions()
    assert conditions["machine"]["cores"] >= 1
    assert conditions["versions"]["torch"] == torch.__version__


def test_descent_lowers_both_objectives(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)  # the program imports its neighbours
    program = load("descent")
    torch.manual_seed(0)
    W = program.weights(64, 256, 0).float()
    found = program.measure("down", W, program.correlated(2, 32), Scheme(4, 128), [1])
    assert found["one_sided"]["one_sided"] < 1
    assert found["two_sided_1"]["two_sided"] < found["one_sided"]["two_sided"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "grok"])
def test_a_small_moe_is_trained_and_read(family, tmp_path, monkeypatch):
    program = load("train_moe")
    monkeypatch.setattr(train_toy, "BATCH", 2)
    tokens = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(0))
    states = []
    for seed in (0, 0, 1):
        model = program.new_model(family, 5, seed)
        batches = train_toy.Batches(tokens, tokens, seed)
        before = train_toy.loss_of(model, tokens[None, :257]).item()
        train_toy.train(model, batches, tokens, 2)
        assert train_toy.loss_of(model.eval(), tokens[None, :257]).item() < before
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert all(0 <= share <= 1 / 8 for share in program.least_shares(model, tokens[None, :256]))
    model.bfloat16().save_pretrained(tmp_path)
    shutil.copyfile(TOY_PATH / "tokenizer.model", tmp_path / "tokenizer.model")
    experts = [name for name, _ in open_checkpoint(tmp_path).units() if ".experts." in name]
    assert len(experts) == 2 * 8 * 3


def test_texts_of_a_package_are_in_one_part(tmp_path, monkeypatch):
    program = load("train_moe")
    monkeypatch.setattr(program.sysconfig, "get_path", lambda _: str(tmp_path))
    for number in range(30):
        package = tmp_path / f"p{number}"
        (package / "tests").mkdir(parents=True)
        (package / "a.py").write_text(f"p{number} code")
        (package / "tests" / "b.py").write_text("a test")
        about = tmp_path / f"p{number}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"p{number} about")
    found = {
        part: {text.split()[0] for text in program.package_files(part, "*.py", "METADATA")}
        for part in ("train", "calibration", "heldout")
    }
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 30
    assert len(list(program.package_files("train", "*.py"))) == len(found["train"]) > 15
    text = "x" * 50
    assert program.joined(iter([text, text, "y" * 50]), 60) == f"{text}\n\n\n\n{'y' * 6}\n"


@pytest.mark.slow
def test_import_cost_has_a_line_for_each_program(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)  # the program imports its neighbour
    found = {line["what"]: line for line in run_program("import_cost", "--rounds", 1)}
    assert [*found] == [*load("import_cost").PROGRAMS]
    for line in found.values():
        assert line["ratio"] == line["seconds"] / line["against_seconds"]


@pytest.mark.slow
def test_weight_only_and_lossless_compare_with_plain_copies(small, tmp_path):
    given = ("--release", small, "--work", tmp_path, "--repeat", 1)
    source_bytes = sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
    absmax, mse = run_program("weight_only", *given)
    assert (absmax["rules"], mse["rules"]) == ("int4-absmax", "int4-mse")
    for found in (absmax, mse):
        assert found["output_bytes"] < found["source_bytes"] == source_bytes
        assert found["ratio_to_dd"] == found["seconds"] / found["dd_seconds"]
        assert set(found["busy_share"]) >= {"writing"}
    (lossless,) = run_program("lossless", *given)
    assert lossless["share"] == lossless["cp_sync_seconds"] / lossless["seconds"]
    assert lossless["output_bytes"] > lossless["source_bytes"] * 0.99
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_streamed_eval_reads_each_model_once(small, tmp_path):
    given = ("--release", small, "--work", tmp_path, "--tokens", 512)
    (found,) = run_program("streamed_eval", *given, "--dtypes", "bfloat16")
    assert (found["tokens"], found["dtype"]) == (512, "bfloat16")
    assert found["mean_kld"] > found["noise_kld"] > 0
    assert found["peak_rss"] > found["peak_anonymous"] > 10**8
    assert list(tmp_path.iterdir()) == []


def test_an_ablation_compares_equal_draws_and_texts(tmp_path, monkeypatch):
    program = load("ablation")
    assert all(hasattr(two_sided, name) for part in program.PARTS.values() for name in part.patches)
    setup = program.Setup("toy", 3, 64, [None, "texts/code.txt"])
    made = []
    monkeypatch.setattr(grokquant, "quantize", lambda r: made.append((r, two_sided.solve_)))
    for name in ("gptq", "targets are the stored matrices", "two-sided"):
        setup.quantized(program.PARTS[name], 1, tmp_path)
    assert [r["quantize"][0]["method"] for r, _ in made] == ["gptq", "two-sided", "two-sided"]
    # A patch ends with its run.
    assert made[1][1] is program.stays and made[0][1] == made[2][1] == two_sided.solve_
    klds = {"gptq": (0.4, 0.2, 0.8, 0.5), "two-sided": (0.2, 0.1, 0.4)}
    rows = []
    for name, values in klds.items():
        draws = itertools.product((0, 1), setup.texts)
        rows += [setup.key(name, *d) | {"kld": k} for d, k in zip(draws, values, strict=False)]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert program.ratios(program.read(results), setup, "two-sided") == [0.5, 0.5, 0.5]
    assert "| two-sided | 0.500 ± 0.000 | 3 |" in program.table(rows, setup)
    assert program.is_of(rows[-1], setup.key("two-sided", 1, None))
