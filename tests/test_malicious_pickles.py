"""Files of a release that would run something: refused in one line, and Python does nothing."""

import json
import subprocess
import sys
from pathlib import Path

import malicious_pickles
import pytest
from malicious_pickles import MALICIOUS


@pytest.fixture(scope="module")
def found() -> dict[str, list]:
    """What the process that read them says of each: complaint, events, modules, files."""
    program = Path(malicious_pickles.__file__)
    command = [sys.executable, str(program)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return json.loads(done.stdout)


def test_there_are_many():
    assert len(MALICIOUS) >= 100 and len(set(MALICIOUS.values())) == len(MALICIOUS)


@pytest.mark.parametrize("case", MALICIOUS)
def test_nothing_runs(found, case):
    complaint, events, modules, files = found[case]
    assert complaint is not None and complaint.isprintable() and len(complaint) < 400
    assert complaint.startswith("tensor00000_000: not a Grok-1 tensor file: ")
    assert set(events) == {"open tensor00000_000"}
    assert (modules, files) == (0, ["tensor00000_000"])


def test_the_hook_would_hear_it(found):
    _, events, _, _ = found["unpickled"]
    heard = {event.split()[0] for event in events}
    assert {"pickle.find_class", "compile", "exec"} <= heard
