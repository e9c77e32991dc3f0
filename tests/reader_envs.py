"""Programs of tests/readers run beside the packages that they ask, in environments of their own."""

import os
import subprocess
from pathlib import Path

import pytest

READERS = os.environ.get("GROKQUANT_READERS", "")
only_with_readers = [
    pytest.mark.readers,
    pytest.mark.skipif(not READERS, reason="GROKQUANT_READERS names no environments"),
]


only_with_engines = [
    pytest.mark.engines,
    pytest.mark.skipif(not READERS, reason="GROKQUANT_READERS names no environments"),
]


def run_reader(environment: str, program: str, *arguments: object) -> None:
    """Runs tests/readers/`program` in an environment that `make test-readers` has made."""
    python = Path(READERS) / environment / "bin" / "python"
    script = Path(__file__).parent / "readers" / program
    done = subprocess.run([python, script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
