"""inspect shows what a checkpoint holds, verify whether it is whole."""

import sys

import click

from grokquant.cli.group import command
from grokquant.cli.options import MODEL, PATH, json_option
from grokquant.cli.printing import print_json, say


@command()
@click.argument("path", type=MODEL)
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Show the contents of a checkpoint.

    Prints family, layers, experts, parameters, bytes, bits per weight and every tensor.
    """
    from grokquant.reporting.inspection import describe
    from grokquant.reporting.terminal import print_description

    description = describe(path)
    if as_json:
        print_json(description)
    else:
        print_description(description)


@command()
@click.argument("output", type=PATH)
@click.option("--digest", metavar="HEX", help="Digest that `quantize` printed when it made OUTPUT.")
@json_option
def verify(output: str, digest: str | None, as_json: bool) -> None:
    """Check that an output is whole and unchanged.

    Every file must be there, match its checksum and belong to the output. Recipe, config, index,
    report and the headers of the files must agree, and all values must be finite. Prints every
    fault on a line of its own. Who can write to OUTPUT can make all of this agree; only --digest
    finds that.
    """
    from pathlib import Path

    from grokquant.job.seal import digest_of
    from grokquant.job.shards import SUMS_NAME
    from grokquant.job.verify import Fault, FaultsFound
    from grokquant.job.verify import verify as check

    faults: tuple[Fault, ...] = ()
    matrices = None
    try:
        matrices = check(output, digest)
    except FaultsFound as found:
        faults = found.faults
    if as_json:
        rows = [{"file": fault.file, "text": fault.text} for fault in faults]
        listed = Path(output, SUMS_NAME).is_file()
        found_digest = digest_of(Path(output)) if listed else None
        print_json({"output": output, "matrices": matrices, "digest": found_digest, "faults": rows})
    else:
        for fault in faults:
            say(f"grokquant: {fault}", err=True)
    if faults:
        if not as_json and any(fault.file for fault in faults):
            say(f"grokquant: {_remedy(output)}", err=True)
        sys.exit(FaultsFound.exit_code)
    if not as_json:
        say(f"{output}: ok, {matrices} quantized matrices match the report")


def _remedy(output: str) -> str:
    """The command that makes damaged files of a result again."""
    import shlex
    from pathlib import Path

    recipe, result = (shlex.quote(str(path)) for path in (Path(output, "recipe.yaml"), output))
    command = f"grokquant quantize {recipe} --set model.path=MODEL --output {result} --repair"
    return f"files can be made again from the source: {command}"
