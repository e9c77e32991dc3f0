"""Several processes make one result, with the same bytes as one."""

import shutil

from members import together

from grokquant.job import pipeline


def test_any_number_of_members_gives_the_same_bytes_without_data(tiny_recipe):
    rules = {"match": "layers.*", "method": "rtn", "bits": 4, "group": 32}
    recipe = tiny_recipe(rules, output={"path": tiny_recipe().output.path, "shard": "100KB"})
    sums = []
    for size in (1, 2, 3):
        outputs = together(size, lambda team: pipeline.quantize(recipe, team=team))
        sums.append((outputs[0] / "SHA256SUMS").read_text())
        shutil.rmtree(outputs[0])
    assert sums[1] == sums[0] and sums[2] == sums[0]
