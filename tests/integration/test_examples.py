"""The examples run, in their order, and print what they promise."""

import re
import runpy
from pathlib import Path

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = {}
    for script in SCRIPTS:
        runpy.run_path(str(script))
        printed[script.stem] = capsys.readouterr().out
    assert printed["01_prune"].count("50.00% zeros") == 6
    assert "56.8% of the dense bytes" in printed["02_pack_and_generate"]
    assert "def main(" in printed["02_pack_and_generate"]
    rules = re.findall(r"layers\.(\d)\.(\S+)\.weight: (\S+)%", printed["03_rules"])
    fractions = {(block, name): float(found) for block, name, found in rules}
    assert fractions["1", "fc2"] == 40.0
    assert fractions["1", "fc1"] == 60.0
    assert fractions["5", "fc2"] == 50.0
    assert fractions["0", "self_attn.q_proj"] == 0.0
    dense, pruned = re.findall(r"perplexity (\S+)", printed["04_evaluate"])
    assert float(dense) < float(pruned)
    theirs, own = re.findall(r"(\d\.\d+)$", printed["05_own_solver"], re.MULTILINE)
    assert float(theirs) > float(own)
