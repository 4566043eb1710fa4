"""The command line: what it prints, on which stream, and its exit codes."""

import json
import subprocess
import sys

import pytest

import halve
from halve.cli import console, main
from halve.cli import prune as prune_command
from halve.errors import HalveError
from halve.options import EvalOptions
from halve.records.stored import read_measurements
from tests.tables import BUNDLED


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a command line: (exit code, output, errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, arguments)])
        capsys.readouterr()  # what making the model has printed
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def options(text):
    return ["--calibration", text, "--samples", "8", "--seq-len", "32"]


@pytest.mark.parametrize(
    "command", ["prune", "eval", "inspect", "verify", "generate", "bench", "demo"]
)
def test_help_ends_with_examples(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0
    examples = out[out.index("Examples") :]
    assert examples.count(f"halve {command}") >= 2


@pytest.mark.parametrize("arguments", [["prune"], ["nonsense"], ["prune", "a", "--x"]])
def test_bad_usage_exits_with_two(arguments, run):
    assert run(*arguments)[0] == 2


def test_prune_help_has_panels(run):
    _, out, _ = run("prune", "--help")
    panels = ["Target", "Solver", "Calibration", "Few bits", "Resources", "Output"]
    places = [out.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places)
    for flag in (
        "--sequential",
        "--no-sequential",
        "--asymmetric",
        "--pack",
        "--refit",
    ):
        assert flag in out
    assert "--no-refit" not in out


def test_prune_prints_a_table_and_its_progress_on_different_streams(
    run, pico, options, tmp_path
):
    code, out, err = run("prune", pico("llama"), "-o", tmp_path / "out", *options)
    assert code == 0
    assert "model.layers.1" in out
    assert "50.00% of the prunable weights are zero" in out
    assert "block 2 of 2: solving" in err
    assert "left" in err


def test_prune_says_how_far_matrices_differ_and_whose_windows_they_saw(
    run, pico, options, tmp_path
):
    target, own = tmp_path / "out", ("--self-samples", "25%")
    _, out, _ = run("prune", pico("llama"), "-o", target, *options, *own)
    found = sorted(matrix.sparsity for matrix in halve.inspect(target).matrices)
    assert f"single matrices: {found[0]:.2%} to {found[-1]:.2%}." in out
    assert "Calibrated on 8 windows of 32 tokens" in out
    assert "2 of them sampled from the model." in out
    alike = tmp_path / "alike"
    _, out, _ = run("prune", pico("llama"), "-o", alike, *options, "--solver", "wanda")
    assert "single matrices" not in out
    assert "sampled" not in out


def test_prune_json_is_one_object_and_quiet_is_silent(run, pico, options, tmp_path):
    target = tmp_path / "out"
    code, out, err = run("prune", pico("llama"), "-o", target, "--json", "-q", *options)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((target / "halve.json").read_text())


def test_prune_evaluates_as_eval_does_and_keeps_the_figures(
    run, pico, options, text, tmp_path, monkeypatch
):
    """With --json the figures are part of the object."""
    suggested, used = [], []
    monkeypatch.setattr(
        console, "print_next", lambda *commands: suggested.extend(commands)
    )
    compare = prune_command.compare_showing

    def watched(*arguments):
        used.append(arguments[2])
        return compare(*arguments)

    monkeypatch.setattr(prune_command, "compare_showing", watched)
    target = tmp_path / "out"
    evaluated = ("--evaluate", text, "--activation-memory", "64MiB", "--device", "cpu")
    arguments = ["prune", pico("llama"), "-o", target, *options, *evaluated]
    code, out, err = run(*arguments)
    assert code == 0
    assert "KL divergence: mean" in out
    assert out.index("prunable weights") < out.index("KL divergence")
    assert [command[0] for command in suggested] == ["pack", "report"]
    resources = {"activation_memory": 64 * 2**20, "device": "cpu"}
    assert used == [EvalOptions(data=str(text), **resources)]
    assert "llama" in err
    [kept] = read_measurements(target)
    assert kept.reference == str(pico("llama"))
    found = halve.compare(target, pico("llama"), data=str(text))
    assert kept.record["kl_mean"] == found.kl_mean
    # The run has finished, so this measures again, in the place of the first time.
    _, out, _ = run(*arguments, "--json")
    printed = json.loads(out)
    assert printed.pop("evaluation")["kl_mean"] == found.kl_mean
    assert printed == json.loads((target / "halve.json").read_text())
    assert len(read_measurements(target)) == 1


def test_a_text_too_short_to_evaluate_on_is_refused_before_pruning(
    run, pico, options, tmp_path
):
    short = tmp_path / "short.txt"
    short.write_text("Too few words.")
    target = tmp_path / "out"
    pruned = ("prune", pico("llama"), "-o", target, *options)
    code, out, err = run(*pruned, "--evaluate", short)
    assert (code, out) == (1, "")
    assert "too few for one segment" in err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_dry_run_prints_the_plan_and_writes_nothing(run, pico, tmp_path):
    target = tmp_path / "out"
    code, out, _ = run("prune", pico("llama"), "-o", target, "--dry-run")
    assert code == 0
    assert "2 blocks with 14 matrices" in out
    code, out, _ = run("prune", pico("llama"), "-o", target, "--dry-run", "--json")
    figures = json.loads(out)
    assert figures["prunable_weights"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert not any(tmp_path.iterdir())
    plan = halve.plan(pico("llama")).to_dict()
    assert plan["identity"] == figures["identity"]
    assert plan["bytes_output"] == figures["bytes_output"]
    assert plan.keys() == figures.keys()


def test_the_dry_run_prints_every_phase(run, pico, tmp_path):
    arguments = ["prune", pico("llama"), "-o", tmp_path / "out", "--refine"]
    code, out, _ = run(*arguments, "--dry-run", "--verbose")
    assert code == 0
    assert out.startswith("Peak memory: ")
    for phase in ("embedding", "collecting", "solving", "refining", "writing"):
        assert phase in out
    assert out.count("collecting") == 1 + ("while collecting" in out)
    code, out, _ = run(*arguments, "--dry-run", "--json", "--memory", "20GiB")
    figures = json.loads(out)
    parts = figures["bytes_by_phase"][figures["largest_phase"]]
    rest = figures["bytes_process"] + figures["bytes_activations_in_memory"]
    assert figures["bytes_peak"] == sum(parts.values()) + rest
    assert figures["seconds"] > 0


def test_an_allocation_is_planned_and_printed(run, pico, options, tmp_path):
    chosen = ["--allocation", "error", "--solver", "sparsegpt"]
    arguments = ["prune", pico("llama"), "-o", tmp_path / "out", *options, *chosen]
    code, out, _ = run(*arguments, "--dry-run")
    assert code == 0
    assert "after two to four trials" in out
    code, out, err = run(*arguments)
    assert code == 0
    assert "Divergence on held-out windows by strength of allocation: 0: " in out
    assert "block 2 of 2: trying allocations, strength 0.05" in err


def test_a_finished_run_is_reported(run, pico, options, tmp_path):
    arguments = ["prune", pico("llama"), "-o", tmp_path / "out", *options]
    _, first, _ = run(*arguments)
    code, second, err = run(*arguments)
    assert code == 0
    assert second == first
    assert "finished" in err


def test_eval_and_inspect_print_json(run, pico, text):
    evaluate = ["eval", pico("gpt2"), "--data", text, "--seq-len", 32, "--segments", 3]
    code, out, _ = run(*evaluate, "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["segments"] == 3
    code, out, _ = run(*evaluate, "--against", pico("gpt2"), "--json")
    assert json.loads(out)["agreement"] == 1
    code, out, _ = run("inspect", pico("gpt2"), "--json")
    assert json.loads(out)["matrices"][0]["pattern"] == "dense"


def test_eval_prints_what_the_perplexity_was_measured_on(run, pico, text):
    evaluate = ["eval", pico("gpt2"), "--data", text, "--seq-len", 32, "--segments", 3]
    _, out, _ = run(*evaluate, "--against", pico("gpt2"))
    for phrase in ("perplexity", "+/-", "KL divergence", "100.00%", "3 segments of 32"):
        assert phrase in out


def test_bench_times_three_backends(run, pico, tmp_path):
    halve.prune(pico("gpt2"), tmp_path / "out", solver="magnitude")
    sizes = ["--pp", 0, "--tg", 2, "--batch", 1, "--batch", 2, "--rounds", 1]
    code, out, err = run("bench", tmp_path / "out", *sizes, "--output", "json")
    assert code == 0
    assert "packing" in err
    record = json.loads(out)
    assert [result["test"] for result in record["results"]] == [
        *(["tg2"] * 3),
        *(["tg2 x2"] * 3),
    ]
    assert record["sizes"]["halve packed"] < record["sizes"]["halve dense"]


@pytest.mark.parametrize("arguments", [[], [".", "--random-opt", "125m"]])
def test_bench_takes_exactly_one_model(arguments, run):
    code, _, err = run("bench", *arguments)
    assert code == 2
    assert "--random-llama" in err
    with pytest.raises(HalveError, match="--random-llama"):
        halve.bench(*arguments[:1], random_opt="125m" if arguments else None)


def test_inspect_prints_a_line_a_block_or_a_matrix(run, pico):
    _, out, _ = run("inspect", pico("gpt2"))
    assert out.count("h.") == 2
    assert "Whole model" in out
    _, out, _ = run("inspect", pico("gpt2"), "--all")
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert out.count(f"  {name} ") == 2


def test_inspect_fits_a_narrow_terminal(run, pico, monkeypatch):
    """No name is cut, since it would not tell one matrix from another."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    for arguments in ([], ["--all"]):
        _, out, _ = run("inspect", pico("llama"), *arguments)
        assert max(map(len, out.splitlines())) <= 80
        assert "…" not in out
        assert "model.layers.1" in out


def test_generate_continues_the_prompt(run):
    _, out, _ = run("generate", BUNDLED, "def main(", "--max-new-tokens", 8)
    assert out.startswith("def main(")
    assert len(out) > len("def main(\n")


def test_self_calibration_needs_no_text(run, pico, tmp_path):
    code, _, _ = run(
        "prune", pico("gpt2"), "-o", tmp_path / "out", "--calibration", "self",
        "--samples", 4, "--seq-len", 16,
    )  # fmt: skip
    assert code == 0


def test_help_loads_nothing_heavy():
    """`halve --help` imports neither torch nor transformers, so that it is fast."""
    code = (
        "import sys, contextlib, halve.cli.app as a\n"
        "with contextlib.suppress(SystemExit): a.app(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "sys.exit(bool(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL
    )
    assert done.returncode == 0
