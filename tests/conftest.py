"""Fixtures that several test modules share."""

import pytest
from make_release import write_random_release


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory):
    """A random Grok in the release's layout whose matrices hold groups of 32 and 128."""
    directory = tmp_path_factory.mktemp("tiny")
    write_random_release(
        directory, layers=2, hidden=128, ffn=256, heads=2, kv_heads=1, head_dim=64, vocab=2048
    )
    return directory
