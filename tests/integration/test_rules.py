"""Rules for single matrices, files of options and presets (`--rule`, `--config`)."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import halve
from halve.cli.app import app
from halve.errors import HalveError
from halve.measure.rule_check import rule_mismatches
from halve.options import PRESETS, PruneOptions, RunOptions, preset_options

OPTIONS = {"samples": 4, "seq_len": 16, "solver": "sparsegpt"}
RULES = {"rules": ("mlp=60%", "down_proj=2:4"), "skip": (r"layers\.0\.self_attn",)}


@pytest.fixture(scope="module")
def ruled(pico, text, tmp_path_factory):
    """Return the model, the output of a run with rules, and its record."""
    out = tmp_path_factory.mktemp("rules") / "out"
    record = halve.prune(
        pico("llama"), out, calibration=str(text), refine=True, epochs=1, **RULES,
        **OPTIONS,
    )  # fmt: skip
    return SimpleNamespace(model=pico("llama"), out=out, record=record)


def expected(tensor):
    """Return the pattern that the rules ask for."""
    if "layers.0.self_attn" in tensor:
        return "0%"
    return "2:4" if "down_proj" in tensor else "60%" if "mlp" in tensor else "50%"


def tensors(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def test_each_matrix_has_the_sparsity_of_the_last_rule_that_matches(ruled):
    for matrix in ruled.record.all_matrices:
        assert matrix.pattern == expected(matrix.tensor)
    zeros = {m.tensor: m.sparsity for m in halve.inspect(ruled.out).matrices}
    for tensor, sparsity in zeros.items():
        wanted = {"60%": 0.6, "50%": 0.5, "2:4": 0.5, "0%": 0.0}[expected(tensor)]
        assert wanted - 1e-3 < sparsity < wanted + 0.01, tensor


def test_skipped_matrices_keep_every_bit_even_if_blocks_are_refined(ruled):
    before, after = tensors(ruled.model), tensors(ruled.out)
    skipped = [name for name in before if expected(name) == "0%"]
    assert len(skipped) == 4
    for name in skipped:
        assert torch.equal(before[name], after[name]), name


def test_rules_are_recorded_and_verified(ruled):
    identity = json.loads((ruled.out / "halve.json").read_text())["identity"]
    assert identity["rules"] == list(RULES["rules"])
    assert identity["skip"] == list(RULES["skip"])
    assert halve.verify(ruled.out).sound


def test_a_pattern_that_is_not_that_of_the_rule_is_found(ruled):
    identity = ruled.record.identity | {"rules": ["mlp=70%"]}
    found = list(rule_mismatches(replace(ruled.record, identity=identity)))
    assert len(found) == 6
    assert "not 70% as by the rules" in found[0].problem
    assert list(rule_mismatches(replace(ruled.record, identity={"rules": 7})))


def test_a_run_with_the_same_rules_is_finished(ruled, text):
    again = halve.prune(
        ruled.model, ruled.out, calibration=str(text), refine=True, epochs=1, **RULES,
        **OPTIONS,
    )  # fmt: skip
    assert again == ruled.record


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rules": ("nonesuch=60%",)}, "matches no matrix"),
        ({"skip": ("nonesuch",)}, "matches no matrix"),
        ({"skip": ("proj",)}, "nothing would be pruned"),
        ({"rules": ("q_proj=3:7",)}, "does not divide"),
    ],
    ids=str,
)
def test_rules_that_do_not_fit_the_model_are_refused(options, word, pico, tmp_path):
    with pytest.raises(HalveError, match=word):
        halve.prune(pico("llama"), tmp_path / "out", solver="magnitude", **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def parsed(monkeypatch):
    """Return a function from a command line of prune to its options."""
    given = []

    def parse(*arguments):
        def keep(job, run_options, quiet):
            given.append((job[2], run_options))

        monkeypatch.setattr("halve.cli.prune._prune", keep)
        app(["prune", *map(str, arguments)], standalone_mode=False)
        return given.pop()

    return parse


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "out: somewhere\nsparsity: 60%\nseq-len: 32\nrule: ['down_proj=70%']\n"
        "skip: [lm_head]\nrefine: true\nsymmetric: false\nquantize: int4\n"
        "memory: 2GiB\ndamping: 0.1\n"
    )
    return path


def test_a_file_holds_any_option_and_the_command_line_overrides_it(parsed, config):
    options, run_options = parsed(".", "--config", config, "--damping", 0.5)
    assert options == PruneOptions(
        sparsity="60%", seq_len=32, rules=("down_proj=70%",), skip=("lm_head",),
        refine=True, symmetric=False, quantize="int4", damping=0.5,
    )  # fmt: skip
    assert run_options.memory == 2 * 2**30
    assert isinstance(run_options, RunOptions)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_options_that_others_override(preset, parsed, config):
    options, _ = parsed(".", "-o", "out", "--preset", preset)
    assert options == PruneOptions(**preset_options(preset))
    options, _ = parsed(".", "-o", "out", "--preset", preset, "--solver", "wanda")
    assert options.solver == "wanda"
    config.write_text(f"preset: {preset}\nepochs: 9\n")
    options, _ = parsed(".", "-o", "out", "--config", config)
    assert options == PruneOptions(**preset_options(preset), epochs=9)


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ("sparsty: 60%", ("sparsty", "Did you mean sparsity?")),
        ("[", ("YAML", "--config")),
        ("7", ("holds no options", "--config")),
        (None, ("run.yaml", "--config")),
        ("preset: nonesuch", ("nonesuch", "fast, default, best")),
    ],
)
def test_files_that_cannot_be_used(contents, words, parsed, tmp_path):
    path = tmp_path / "run.yaml"
    if contents is not None:
        path.write_text(contents)
    with pytest.raises(HalveError) as error:
        parsed(".", "-o", "out", "--config", path)
    assert all(word in str(error.value) for word in words), error.value
