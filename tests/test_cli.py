"""The command line: what each command prints where, and how it ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from os.path import relpath
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import ATTENTION, EXPERTS, own_text

import grokquant
from grokquant.cli import main
from grokquant.cli.printing import bounded
from grokquant.escaping import lines, one_line
from grokquant.files.atomic import sha256
from grokquant.formats import FORMATS

ROOT = Path(grokquant.__file__).parents[1]
ESCAPE = "\x1b"
UNITS = 2 * (4 + 4 * 3)


def run(*arguments: object, **environment: str) -> Result:
    """A command that may not raise anything; its output must be plain text."""
    result = CliRunner(env=environment).invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    if not environment:
        assert ESCAPE not in result.output and "\r" not in result.output
    return result


def done(*arguments: object) -> str:
    """stdout of a command that ends well."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def json_of(*arguments: object) -> dict:
    return json.loads(done(*arguments, "--json"))


def settings(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def recipe(place, tiny_release, text_file) -> Path:
    path = place / "recipe.yaml"
    values = {
        "model": {"path": str(tiny_release)},
        "calibration": {"text": str(text_file), "samples": 16, "length": 64},
        "quantize": [EXPERTS, ATTENTION],
        "output": {"path": str(place / "out")},
        "eval": {"text": relpath(text_file), "samples": 4, "length": 64},
    }
    path.write_text(json.dumps(values))  # YAML holds JSON
    return path


@pytest.fixture(scope="module")
def finished(recipe) -> Result:
    return run("quantize", recipe)


@pytest.fixture(scope="module")
def output(finished, place) -> Path:
    return place / "out"


# --- help and usage


def test_help_tells_commands_examples_and_exit_codes():
    text = done("--help")
    commands = {"quantize", "plan", "convert", "eval", "compare", "inspect", "verify"}
    commands |= {"budget", "generate", "recipes"}
    assert set(main.commands) == commands
    for command in main.commands:
        (line,) = re.findall(rf"^  {command} .*", text, re.MULTILINE)
        assert line.endswith(".") and not line.endswith("...")  # no description is cut
    text = " ".join(text.split())
    assert "grokquant quantize toy" in text
    for code in ("0 success", "1 a quality", "2 invalid command", "130 interrupted"):
        assert code in text


@pytest.mark.parametrize("command", main.commands)
def test_help_of_a_command_explains_every_option(command):
    text = done(command, "--help")
    for parameter in main.commands[command].params:
        if getattr(parameter, "hidden", False):
            assert parameter.opts[0] not in text
        elif parameter.param_type_name == "option":
            assert parameter.opts[0] in text
            assert parameter.help
        else:
            assert parameter.human_readable_name in text


def test_convert_lists_the_formats_that_are_written():
    (option,) = (p for p in main.commands["convert"].params if p.name == "output_format")
    assert list(option.type.choices) == list(FORMATS)
    assert all(name in done("convert", "--help") for name in FORMATS)


def test_version():
    assert done("--version").strip().endswith(f"version {grokquant.__version__}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantise"],
        ["--loud"],
        ["quantize"],
        ["quantize", "a.yaml", "b.yaml"],
        ["quantize", "a.yaml", "--set"],
        ["plan", "a.yaml", "--dry-run"],
        ["eval", "out", "--reference", "toy", "--samples", "0"],
        ["eval", "out", "--reference", "toy", "--length", "long"],
        ["compare"],
        ["convert", "out", "--format", "zip"],
        ["generate", "toy"],
        ["generate", "toy", "--prompt", "x", "--tokens", "0"],
        ["generate", "toy", "--prompt", "x", "--temperature", "-1"],
        ["generate", "toy", "--prompt", "x", "--seed", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Error: " in result.stderr


# --- quantize and plan


def test_quantize_prints_sizes_bits_and_the_report(finished, output):
    assert finished.exit_code == 0, finished.stderr
    sizes, report, digest = finished.stdout.splitlines()
    row = json.loads((output / "quantization-report.json").read_text())
    assert re.fullmatch(rf"{output}: 1\.98 MB -> 1\.62 MB, 11\.253 bits per weight, \d+ s", sizes)
    assert (round(row["bits_per_weight"], 3), round(row["output_bytes"], -4)) == (11.253, 1620000)
    assert report == f"report: {output / 'quantization-report.json'}"
    assert digest == f"digest: {sha256(output / 'SHA256SUMS')}"


def test_quantize_shows_the_plan_and_a_line_per_block_on_stderr(finished, output):
    report = json.loads((output / "quantization-report.json").read_text())
    stderr = finished.stderr
    for grid in ("int4 g32 sym (gptq)", "int8 channel sym (copy)", "int8 g16 sym (copy)"):
        assert grid in stderr
    lines = lines_of(stderr, "layer ")
    assert len(lines) == 2
    for index, line in enumerate(lines):
        rows = [row for row in report["units"] if row["name"].startswith(f"layers.{index}.")]
        errors = [row["output_error"] for row in rows if row["method"] == "gptq"]
        fewest = min(report["tokens_per_expert"][index])
        error, bits, tokens, left = re.fullmatch(
            rf"layer {index}: output error (\S+), (\S+) bits, fewest tokens for an expert: (\d+), "
            r"(\d+) s left",
            line,
        ).groups()
        assert float(error) == pytest.approx(sum(errors) / len(errors), abs=1e-4)
        assert 4.5 < float(bits) < 5.5 and int(tokens) == fewest and int(left) < 60
    assert lines[-1].endswith(" 0 s left")


def test_quantize_takes_set_and_says_what_fell_back(recipe, tmp_path):
    changes = (f"output.path={tmp_path}/other", "quantize[0].bits=8", "max_fallbacks=1")
    text = done("quantize", recipe, *settings(*changes, "experts.min_tokens=1000000"))
    assert "24 matrices fell back to rtn" in text
    grids = json_of("inspect", tmp_path / "other")["matrices"]
    assert grids["int8 g32 sym"] == 24 and not any("int4" in grid for grid in grids)


def test_dry_run_prints_the_plan_and_writes_nothing(recipe, tmp_path):
    change = settings(f"output.path={tmp_path}/out")
    plan = done("plan", recipe, *change)
    again = done("quantize", recipe, "--dry-run", *change)
    # By a probe, which never takes quite as long: steps are listed by their share of the time.
    parts = [text.partition("\nmemory: ") for text in (plan, again)]
    assert parts[0][0] == parts[1][0]
    assert all("\ntime: " in measured for _, _, measured in parts)
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path / "out") in plan.splitlines()[0]
    for part in ("experts.down", "int4 g32 sym (gptq)", "1,149,056 weights", "11.253 bits"):
        assert part in plan


def test_plan_as_json_is_what_quantize_makes(recipe, output):
    plan = json_of("plan", recipe)
    made = json_of("inspect", output)
    assert plan["output_bytes"] == sum(f.stat().st_size for f in output.glob("*.safetensors"))
    assert plan["output_bytes"] == made["bytes"]
    assert 0 < made["bytes"] - sum(t["bytes"] for t in made["tensors"]) < 20_000  # headers
    assert plan["bits_per_weight"] == made["bits_per_weight"]
    assert plan["parameters"] == made["parameters"]
    report = json.loads((output / "quantization-report.json").read_text())
    planned = {(unit["name"], unit["method"]) for unit in plan["units"]}
    assert planned == {(row["name"], row["method"]) for row in report["units"]}
    assert len(plan["units"]) == UNITS and plan["kept"] == []


def test_a_missed_gate_exits_1(recipe, tmp_path):
    changes = settings("experts.min_tokens=1000000", f"output.path={tmp_path}/out")
    result = run("quantize", recipe, *changes)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("grokquant: ")
    assert "max_fallbacks" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


# --- eval and compare


@pytest.fixture(scope="module")
def evaluated(output, tiny_release, text_file, place) -> Result:
    options = ("--text", text_file, "--samples", 3, "--length", 32, "--output", place / "reports")
    return run("eval", output, "--reference", tiny_release, *options, "--json")


def test_eval_json_is_the_report_alone(evaluated, place):
    assert evaluated.exit_code == 0, evaluated.stderr
    report = json.loads(evaluated.stdout)
    assert report == json.loads((place / "reports" / "report.json").read_text())
    assert (place / "reports" / "report.html").read_text().startswith("<!doctype html>")
    assert report["protocol"]["samples"] == 3 and report["protocol"]["length"] == 32
    assert report["protocol"]["tokens_scored"] == 3 * 31
    assert len(report["units"]) == UNITS


def test_eval_tells_of_each_layer_on_stderr(evaluated):
    lines = evaluated.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["layer 0", "layer 1"]
    assert all(re.search(r"error 0\.\d{4}, .* s left$", line) for line in lines)


def test_eval_prints_a_table_and_fills_the_card(output, tiny_release):
    named = ("--text", own_text(output), "--overwrite")
    text = done("eval", output, "--reference", tiny_release, *named)
    assert f"text: {own_text(output)}, as given" in text.splitlines()
    for part in ("Mean PPL(Q)", "Mean KLD", "Same top p", "4 sequences of 64"):
        assert part in text
    page = output / "evaluation" / "report.html"
    assert text.splitlines()[-1] == f"report: {page}" and page.is_file()
    assert "Mean KLD" in (output / "README.md").read_text()
    assert "ok" in done("verify", output)


def test_eval_keeps_the_reference_for_the_next_time(output, tiny_release, place, evaluated):
    options = ("--samples", 3, "--length", 32, "--text", own_text(output), "--overwrite")
    options += ("--output", place / "cached", "--cache", place / "cache")
    first, again = (json_of("eval", output, "--reference", tiny_release, *options) for _ in "12")
    assert first == again
    assert len(list((place / "cache").rglob("layer-*.safetensors"))) == 2
    quick = json_of("eval", output, "--reference", tiny_release, *options[:7], "--quick")
    assert quick["layers"][0]["forced"] is None and first["layers"][0]["forced"]
    small = run("eval", output, "--reference", tiny_release, *options, "--cache-size", "much")
    assert small.exit_code == 2 and "--cache-size: expected a size with a unit" in small.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--suite", "smoke", "--samples", 3], "--samples: cannot be combined with suite smoke"),
        (["--suite", "fidelty"], "--suite: no suite 'fidelty', expected a file or one of"),
        (["--text", "wikitext"], "--text: expected python-docs, python-code, package-docs, a .txt"),
    ],
)
def test_errors_about_a_parameter_name_its_option(output, tiny_release, options, complaint):
    failed = run("eval", output, "--reference", tiny_release, *options)
    assert failed.exit_code == 2 and failed.stderr.startswith(f"grokquant: {complaint}")


def test_compare_prints_tables_markdown_or_json(output, tiny_release, place):
    options = ("--samples", 3, "--length", 32, "--text", own_text(output), "--overwrite")
    itself = (*options, "--output", place / "itself")
    done("eval", tiny_release, "--reference", tiny_release, *itself)
    done("eval", output, "--reference", tiny_release, *options)
    runs = (output, place / "itself")
    found = json_of("compare", *runs)
    assert [run["rank"] for run in found["runs"]] == [1, 2]
    assert found["runs"][1]["name"] == "out" and found["runs"][1]["kld"]["value"] > 0
    assert "Bits per weight" in done("compare", *runs)
    assert done("compare", *runs, "--markdown").startswith("| Model | Rank |")
    told = done("compare", *runs, "--output", place / "compared")
    assert f"page: {place / 'compared' / 'compare.html'}" in told
    written = place / "compared" / "compare.json"
    assert json.loads(written.read_text(encoding="utf-8")) == found
    refused = run("compare", output, place / "nothing")
    assert (refused.exit_code, refused.stdout) == (2, "")


# --- inspect, verify, generate


def test_inspect_json(tiny_release, output):
    release, quantized = json_of("inspect", tiny_release), json_of("inspect", output)
    for description in (release, quantized):
        assert description["family"] == "grok-1"
        assert (description["layers"], description["experts"]) == (2, 4)
        assert description["parameters"] == 1_149_056
        headers = description["bytes"] - sum(t["bytes"] for t in description["tensors"])
        assert 0 < headers < 20_000
        bits = 8 * description["bytes"] / description["parameters"]
        assert description["bits_per_weight"] == pytest.approx(bits)
        assert "tokenizer.model" in description["tokenizer"]
    assert (release["layout"], quantized["layout"]) == ("release", "safetensors")
    assert quantized["matrices"] == {
        "int8 channel sym": 6,
        "int8 g16 sym": 2,
        "int4 g32 sym": 24,
    }


def test_inspect_prints_whole_names_whatever_the_width(output, tmp_path):
    # Names with brackets or colons are no markup; those of tensors are not cut off a terminal.
    odd = tmp_path / "a[/b] [red]c :cat:"
    shutil.copytree(output, odd)
    text = done("inspect", odd)
    assert str(odd) in text
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in text
    for part in ("1,149,056", "1.62 MB", "24 x int4 g32 sym"):
        assert part in text


def test_verify(output, tmp_path):
    assert done("verify", output) == f"{output}: ok, {UNITS} quantized matrices match the report\n"
    damaged = tmp_path / "damaged"
    shutil.copytree(output, damaged)
    shard = damaged / "model-00002-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    result = run("verify", damaged)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"grokquant: {shard}: does not match its checksum")
    assert result.stderr.endswith(f"--set model.path=MODEL --output {damaged} --repair\n")


def test_generate(output):
    options = ("--prompt", "hello", "--tokens", 5)
    texts = [
        done("generate", output, *options),
        done("generate", output, *options, "--temperature", 2, "--seed", 1),
        done("generate", output, *options, "--temperature", 2, "--seed", 1),
        done("generate", output, *options, "--temperature", 2, "--seed", 2),
    ]
    assert all(text.startswith("hello") and len(text) > len("hello\n") for text in texts)
    assert texts[1] == texts[2] and len(set(texts)) == 3
    assert run("generate", output, *options).stderr == ""


# --- colours, control characters, interruptions


def test_on_a_terminal_there_is_a_bar_and_no_color_is_obeyed(recipe, tmp_path):
    change = settings(f"output.path={tmp_path}/out")
    color = re.compile(r"\x1b\[[0-9;]*[34]\d[0-9;]*m")
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm"}
    shown = run("quantize", recipe, *change, **terminal).stderr
    assert "quantizing" in shown and color.search(shown)
    again = run("quantize", recipe, *change, "--overwrite", NO_COLOR="1", **terminal)
    plain = again.stderr
    assert "quantizing" in plain and ESCAPE in plain and not color.search(plain)


def test_hostile_names_cannot_break_the_line_or_color_the_terminal(tmp_path):
    result = run("inspect", tmp_path / "a\nb\x1b[31m\u202e")
    assert result.exit_code == 2
    assert result.stderr == f"grokquant: {tmp_path}/a\\nb\\x1b[31m\\u202e: no such directory\n"


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("reporting.inspection", "describe", ["inspect", "toy"]),
        ("job.verify", "verify", ["verify", "out"]),
        ("job.plan", "build_plan", ["plan", "{recipe}"]),
        ("job.pipeline", "quantize", ["quantize", "{recipe}"]),
        ("runtime.generate", "generate_text", ["generate", "toy", "--prompt", "x"]),
        ("evaluation.run", "run_suite", ["eval", "toy", "--reference", "toy", "--output", "x"]),
    ],
)
def test_interrupted_commands_exit_130(module, function, arguments, recipe, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"grokquant.{module}"), function, interrupt)
    result = run(*(argument.format(recipe=recipe) for argument in arguments))
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "grokquant: interrupted; no output was written\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_without_loss(number, recipe, tmp_path, monkeypatch):
    def send(*_):
        assert (tmp_path / "out.partial").is_dir()
        os.kill(os.getpid(), number)

    monkeypatch.setattr("grokquant.reporting.terminal.RunProgress.layer_done", send)
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal
    result = run("quantize", recipe, *settings(f"output.path={tmp_path}/out"))
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, ignored)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == (
        "grokquant: stopped, 2 of 3 files are done; run the same command to resume"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


# --- real processes


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "grokquant", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background
    )


def test_a_process_keeps_its_streams_apart(recipe):
    process = start("plan", recipe, "--json")
    stdout, stderr = process.communicate(timeout=300)
    lines = [line for line in stderr.splitlines() if not line.endswith(" so far")]
    assert (process.returncode, lines) == (0, [])
    assert json.loads(stdout)["family"] == "grok-1"


def test_an_interrupted_process_leaves_nothing_but_what_is_committed(recipe, tmp_path):
    changes = ("calibration.samples=64", "calibration.length=256", f"output.path={tmp_path}/out")
    process = start("quantize", recipe, *settings(*changes))
    next(line for line in process.stderr if line.startswith("calibration: "))
    assert (tmp_path / "out.partial").is_dir()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (130, "")
    line = r"grokquant: stopped, ([12]) of 3 files are done; run the same command to resume"
    committed = re.fullmatch(line, stderr.splitlines()[-1])
    assert committed and "Traceback" not in stderr, stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    files = [path.name for path in (tmp_path / "out.partial" / "files").iterdir()]
    assert sum(name.startswith("model-") for name in files) == int(committed[1])
    assert not any(name.endswith(".tmp") for name in files)


def test_what_is_shown_of_files_does_not_act_on_the_terminal():
    assert lines("a\x1b]0;x\x07\tb\n") == "a\\x1b]0;x\\x07\tb\n"
    assert one_line("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    assert len(one_line(bounded("\x1b" * 20_000_000))) < 10_000


# --- where eval writes


@pytest.fixture
def evaluating(output, tiny_release, monkeypatch):
    """eval of a finished result, with each call of `run_suite` counted."""
    from grokquant.evaluation import run as module

    runs: list[int] = []
    run_suite = module.run_suite

    def counted(*arguments, **options):
        runs.append(1)
        return run_suite(*arguments, **options)

    monkeypatch.setattr(module, "run_suite", counted)

    def evaluate(*options: object) -> tuple[Result, int]:
        runs.clear()
        scored = ("--samples", 2, "--length", 32, "--text", own_text(output))
        result = run("eval", output, "--reference", tiny_release, *scored, *options)
        return result, len(runs)

    return evaluate


def test_an_evaluation_is_not_repeated_nor_replaced_unasked(evaluating, tmp_path):
    place = tmp_path / "reports"
    first, runs = evaluating("--output", place)
    assert (first.exit_code, runs) == (0, 1), first.stderr
    stamps = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    again, runs = evaluating("--output", place)
    assert (again.exit_code, runs) == (0, 0)
    assert again.stdout == first.stdout
    assert again.stderr == (
        f"{place}: already evaluated, with the same models, texts and versions\n"
    )
    other, runs = evaluating("--output", place, "--samples", 1)
    assert (other.exit_code, runs) == (2, 0)
    assert other.stderr == (
        f"grokquant: {place}: holds an evaluation of something else: "
        "suite.texts[0].samples was 2, now 1; choose another --output, or --overwrite replaces it "
        "once the new one is complete\n"
    )
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == stamps
    replaced, runs = evaluating("--output", place, "--samples", 1, "--overwrite")
    assert (replaced.exit_code, runs) == (0, 1)
    assert json.loads((place / "report.json").read_text())["protocol"]["samples"] == 1


def test_an_evaluation_that_was_changed_is_not_shown(evaluating, output):
    assert evaluating("--overwrite")[0].exit_code == 0
    report = output / "evaluation" / "report.json"
    report.write_text(report.read_text() + " ")
    refused, runs = evaluating()
    assert (refused.exit_code, runs) == (2, 0)
    assert "does not match its checksum" in refused.stderr
    assert refused.stderr.endswith("; --overwrite evaluates again\n")
    assert evaluating("--overwrite")[0].exit_code == 0


def test_a_report_that_cannot_be_read_is_not_replaced_unasked(evaluating, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    refused, runs = evaluating("--output", tmp_path)
    assert (refused.exit_code, runs) == (2, 0) and "it cannot be read" in refused.stderr
    assert (tmp_path / "report.json").read_text() == "{}"


def test_eval_writes_into_no_model_but_results(output, tiny_release, tmp_path):
    source = shutil.copytree(tiny_release, tmp_path / "source")
    before = sorted(path.name for path in source.iterdir())

    def refused(*arguments: object) -> str:
        result = run("eval", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert sorted(path.name for path in source.iterdir()) == before
        return result.stderr.removeprefix("grokquant: ").rstrip()

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: toy}\n")
    assert refused(recipe, "--reference", "toy") == (
        f"{recipe}: is a file, expected the directory of a checkpoint; of a recipe, give the "
        "output.path that `grokquant quantize` has written"
    )
    assert refused(source, "--reference", output) == (
        f"{source}: is not a result of grokquant, but {output} is; the result comes first: "
        f"grokquant eval {output} --reference {source}"
    )
    assert refused(source, "--reference", source) == (
        f"--output: needed for the reports, since {source} is not a result of grokquant: nothing "
        "is written into other models"
    )
    assert refused(output, "--reference", output) == (
        f"--output: needed to compare {output} with itself; a result is compared with the model "
        "that it was made from"
    )


def test_a_result_that_can_only_be_read_is_evaluated(evaluating, output, monkeypatch, tmp_path):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    kept = shutil.copytree(output, tmp_path / "kept")
    monkeypatch.setattr("grokquant.reporting.publish.fill_evaluation", read_only)
    result, _ = evaluating("--output", tmp_path / "reports")
    assert result.exit_code == 0 and "Mean KLD" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        f"{output / 'README.md'}: the results cannot be added: Read-only file system"
    )
    monkeypatch.setattr("grokquant.reporting.html.page.write_text", read_only)
    result, _ = evaluating("--overwrite")
    assert result.exit_code == 0 and "Mean KLD" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        f"{output / 'evaluation'}: cannot be written: Read-only file system; no report is kept"
    )
    assert "ok" in done("verify", output)
    monkeypatch.setattr("grokquant.files.atomic.os.access", lambda *_: False)
    result, _ = evaluating("--overwrite")
    assert result.exit_code == 0 and "Mean KLD" in result.stdout
    assert result.stderr.splitlines()[0] == (
        f"{output / 'evaluation'}: cannot be written: Permission denied, so no report is kept; "
        "--output keeps one"
    )
    assert (output / "README.md").read_bytes() == (kept / "README.md").read_bytes()


# --- onto a finished result


def test_the_same_command_again_says_so_and_does_nothing(finished, recipe, output):
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    again = run("quantize", recipe)
    assert again.exit_code == 0 and again.stderr == ""
    assert re.fullmatch(
        rf"{output}: already finished, from the same recipe, source and versions; all \d+ weight "
        r"files have their sizes, nothing was computed\n",
        again.stdout,
    )
    assert json_of("quantize", recipe)["finished_before"] is True
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_something_else_onto_a_result_is_refused_with_both_ways_out(
    finished, recipe, output, place
):
    refused = run("quantize", recipe, *settings("quantize[0].bits=8"))
    assert refused.exit_code == 2
    assert re.fullmatch(
        rf"grokquant: {output}: holds a finished result of something else: "
        r"recipe\.quantize\[0\]\.bits was 4, now 8; choose another --output, or --overwrite "
        r"replaces that result( and deletes .* in it)?\n",
        refused.stderr,
    )


def test_a_damaged_result_is_repaired(finished, recipe, output, place):
    there = settings(f"output.path={place / 'copy'}")
    shutil.copytree(output, place / "copy")
    shard = next((place / "copy").glob("model-00002*"))
    shard.write_bytes(b"x")
    refused = run("quantize", recipe, *there)
    assert refused.exit_code == 2
    assert f"{shard.name} has 1 bytes, not" in refused.stderr and "; --repair" in refused.stderr
    both = run("quantize", recipe, *there, "--repair", "--overwrite")
    assert both.exit_code == 2 and both.stderr.startswith("grokquant: --overwrite: ")
    assert done("quantize", recipe, *there, "--repair") == (
        f"{place / 'copy'}: repaired {shard.name}; all other files are as they were\n"
    )
    assert "ok" in done("verify", place / "copy")
    assert json_of("quantize", recipe, *there, "--repair")["repaired"] == []


def test_convert_onto_a_result(finished, output, place):
    there = ("--output", place / "converted")
    assert "-> " in done("convert", output, "--format", "gptq", *there)
    assert "already finished" in done("convert", output, "--format", "gptq", *there)
    refused = run("convert", output, "--format", "bf16", *there)
    assert refused.exit_code == 2 and "choose another --output, or --overwrite" in refused.stderr
    (place / "converted" / "notes.txt").write_text("mine")
    replaced = run("convert", output, "--format", "bf16", *there, "--overwrite")
    assert replaced.exit_code == 0, replaced.stderr
    assert "notes.txt in it will be deleted with the old result" in replaced.stderr
    assert "quantization_config" not in json.loads((place / "converted/config.json").read_text())
