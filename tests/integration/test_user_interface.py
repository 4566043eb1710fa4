"""What a user sees: progress, tables, hints, and how soon a mistake is reported."""

import io
import os
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

import halve
from halve.cli import console, evaluate, progress
from halve.cli.app import app
from halve.cli.bench import Output
from halve.cli.bench import _print as print_bench
from halve.cli.progress import Step, progress_bar, step_of_block
from halve.completion import Completer
from halve.errors import HalveError
from halve.evaluation import REFERENCE
from halve.options import GenerateOptions
from halve.records import BenchRecord, FinishedBlock, Progress, SpeedRecord
from tests.tables import BUNDLED

PROMPT = "def main("


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that lets both streams be terminals of 80 columns.

    It is called within the test, since pytest sets the streams before each phase.
    """

    def become():
        streams = SimpleNamespace(out=Terminal(), err=Terminal())
        monkeypatch.setattr(sys, "stdout", streams.out)
        monkeypatch.setattr(sys, "stderr", streams.err)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "xterm")
        return streams

    return become


FINISHED = FinishedBlock("model.layers.0", 0.0431, 12.3, 2**30)


def test_a_finished_block_leaves_a_line(terminal):
    streams = terminal()
    with progress_bar(quiet=False) as show:
        show(step_of_block(Progress(0, 2, "collecting")))
        show(step_of_block(Progress(0, 2, "writing", 7.0, FINISHED)))
    text = streams.err.getvalue()
    assert "model.layers.0: error 4.31%, 12.3 s, peak memory 1 GiB" in text
    assert not streams.out.getvalue()


@pytest.mark.parametrize("left", [None, 7.0])
def test_the_bar_shows_share_time_and_memory(left):
    stream = Terminal()
    screen = console.Console(file=stream, force_terminal=True, width=100)
    with progress._bar(screen) as bar:
        task = bar.add_task("starting", total=None, seconds_left=None)
        progress._update(bar, task, Step("block 2 of 4: solving", 0.25, left))
        bar.refresh()
    text = stream.getvalue()
    for part in ("block 2 of 4: solving", "25%", "left", "peak"):
        assert part in text
    assert ("7.0 s left" in text) == (left is not None)


def test_the_bar_is_one_line_of_a_terminal():
    screen = console.Console(file=Terminal(), force_terminal=True, width=80)
    reference = Progress(119, 126, REFERENCE)
    step = evaluate._step(reference, "pruned", "/a/folder/of/Models/" + "x" * 60)
    for shown in (step, step_of_block(Progress(119, 126, "propagating", 4000.0))):
        assert len(shown.text) < 45
        with progress._bar(screen) as bar:
            task = bar.add_task("starting", total=None, seconds_left=None)
            progress._update(bar, task, shown)
            lines = screen.render_lines(bar.get_renderable(), pad=False)
        assert len(lines) == 1
        text = "".join(segment.text for segment in lines[0])
        for part in ("block 120 of 126", "%", "peak", "B"):
            assert part in text


def test_two_models_of_one_name_are_told_apart():
    steps = [
        evaluate._step(Progress(0, 2, phase), "pruned/llama", "dense/llama").text
        for phase in (REFERENCE, "evaluating")
    ]
    assert steps == [f"{REFERENCE}, block 1 of 2", "llama, block 1 of 2"]


def test_quiet_shows_nothing(terminal):
    streams = terminal()
    with progress_bar(quiet=True) as show:
        show(Step("words", 0.5, line="a line"))
    assert streams.err.getvalue() == streams.out.getvalue() == ""


def test_elsewhere_steps_are_lines(capsys):
    with progress_bar(quiet=False) as show:
        show(step_of_block(Progress(0, 2, "writing", 7.0, FINISHED)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("model.layers.0: error 4.31%")
    assert lines[1] == "block 1 of 2: writing, 7.0 s left"


def test_the_next_command_is_named_on_a_terminal_only(terminal, monkeypatch):
    streams = terminal()
    console.print_next(("eval", "an out", "--against", "model"))
    assert "Next: halve eval 'an out' --against model" in streams.out.getvalue()
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    console.print_next(("eval", "out"))
    assert piped.getvalue() == ""


RECORD = BenchRecord(
    model="opt-125m-packed",
    parameters=125_240_000,
    sizes={"torch": 2**28, "halve dense": 2**28, "halve packed": 2**27},
    cpu="a processor",
    threads=2,
    kernel="avx512bf16",
    bandwidth=2e10,
    results=tuple(
        SpeedRecord(name, test, 1, 128, (1.5, 1.6), 2**27)
        for test in ("pp512", "tg128 x16")
        for name in ("torch", "halve dense", "halve packed")
    ),
    footprints={},
)


def test_the_table_of_bench_fits_a_terminal(terminal):
    streams = terminal()
    print_bench(RECORD, None)
    lines = re.sub(r"\x1b\[[\d;]*m", "", streams.out.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.startswith("|") for line in lines)
    # A heading, and one line a result: nothing is wrapped.
    assert sum(line.startswith("  halve packed") for line in lines) == 2
    assert sum("82.67 ± 3.77" in line for line in lines) == 6
    assert sum("avx512bf16" in line for line in lines) == 1


def test_the_table_of_blocks_fits_a_terminal(terminal, pico, text, tmp_path):
    """What all blocks have in common is said above it, and not in each line."""
    options = {"samples": 4, "seq_len": 32, "calibration": str(text)}
    halve.prune(pico("gpt2"), tmp_path / "half", quantize="int4", **options)
    halve.prune(pico("gpt2"), tmp_path / "some", rules=(r"h\.0=2:4",), **options)
    for name, common in (("half", "dense int4 g128"), ("some", "stored: dense")):
        streams = terminal()
        with pytest.raises(SystemExit):
            app(["inspect", str(tmp_path / name)])
        shown = re.sub(r"\x1b\[[0-9;]*m", "", streams.out.getvalue())
        lines = shown.splitlines()
        assert max(map(len, lines)) <= 80
        assert common in " ".join(shown.split())
        blocks = [line for line in lines if "transformer.h." in line]
        assert len(blocks) == 2
        assert not any("stored" in line or "dense" in line for line in blocks)
        assert ("2:4" in blocks[0]) == (name == "some")


def test_the_table_of_bench_is_markdown_elsewhere(capsys):
    print_bench(RECORD, None)
    piped = capsys.readouterr().out
    assert piped.startswith("| model | size | params |")
    print_bench(RECORD, Output.md)
    assert capsys.readouterr().out == piped


MISTAKES = {
    "solver": ["prune", "model", "-o", "out", "--solver", "gptq"],
    "sparsity": ["prune", "model", "-o", "out", "--sparsity", "60"],
    "device": ["eval", "model", "--device", "xpu"],
    "folder": ["inspect", "./nonesuch"],
    "name": ["inspect", "nonesuch"],
    "name, of a model to prune": ["prune", "nonesuch", "-o", "out"],
    "text": ["prune", ".", "-o", "out", "--calibration", "nonesuch.txt"],
    "text to evaluate on": ["eval", ".", "--data", "./nonesuch.jsonl"],
    "text to evaluate the output on": [
        *("prune", ".", "-o", "out", "--evaluate", "nonesuch.txt"),
    ],
    "text to recover on": [
        *("recover", ".", "--against", ".", "-o", "out"),
        *("--calibration", "nonesuch.txt"),
    ],
    "text to measure on": ["report", ".", "--measure", "--data", "nonesuch.txt"],
    "output": ["verify", "./nonesuch"],
    "output's name": ["verify", "nonesuch"],
    "reference": ["eval", ".", "--against", "./nonesuch"],
    "sampling": ["generate", "model", "words", "--top-k", "5"],
    "bench": ["bench"],
    "rule": ["prune", "model", "-o", "out", "--rule", "a(=50%"],
}
REPORTS = """
import sys
from halve.errors import HalveError
from halve.cli.app import app
for words in {mistakes}:
    try:
        app(words, standalone_mode=False)
    except HalveError:
        pass
    except Exception as error:
        assert "BadParameter" in type(error).__name__, error
    else:
        raise AssertionError(words)
heavy = {{"torch", "transformers", "numpy", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_mistakes_are_reported_before_anything_heavy_is_imported():
    """In one process, which would take seconds for torch and transformers."""
    program = REPORTS.format(mistakes=list(MISTAKES.values()))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    variables = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], env=variables, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2, "all of them together"


def test_a_misspelt_folder_is_suggested(tmp_path, monkeypatch):
    (tmp_path / "novels").mkdir()
    (tmp_path / "novels" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HalveError, match=r"Did you mean the folder \./novels\?"):
        halve.inspect("./novel")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HalveError, match=r"Did you mean the folder \./novels\?"):
        halve.inspect("novel")


def test_packing_a_dense_model_is_refused_before_a_file_is_written(
    pico, tmp_path, monkeypatch
):
    def never(*_):
        raise AssertionError("a matrix was packed")

    monkeypatch.setattr("halve.packing.rewrite.pack_tensor", never)
    with pytest.raises(HalveError, match=r"sparsest of 8 has 0\.0% zeros"):
        halve.pack(pico("gpt2"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_results_are_a_line_in_a_notebook(pico, tmp_path):
    record = halve.prune(pico("gpt2"), tmp_path / "out", solver="magnitude")
    plan = halve.plan(pico("gpt2"), solver="magnitude")
    packed = halve.pack(tmp_path / "out", tmp_path / "packed")
    for value in (record, plan, packed, halve.inspect(tmp_path / "out")):
        assert len(repr(value)) < 200
        assert "\n" not in repr(value)
    error = HalveError("One thing.", "Another.")
    assert error._render_traceback_() == ["HalveError: One thing. Another."]


def test_a_notebook_shows_a_bar(capsys):
    bar = halve.ProgressBar()
    for block in range(2):
        bar(Progress(block, 2, "solving"))
        bar(Progress(block, 2, "writing", None, FINISHED))
    assert "2/2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def completer():
    return Completer.open(BUNDLED, GenerateOptions(max_new_tokens=8, device="cpu"))


def test_streamed_pieces_are_the_text(completer):
    pieces = []
    text = completer.complete(PROMPT, pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert text.startswith(PROMPT)


def test_sampling_follows_its_seed(completer):
    def sample(seed, **options):
        chosen = GenerateOptions(
            max_new_tokens=8, device="cpu", temperature=2.0, seed=seed, **options
        )
        made = Completer("model", completer.model, completer.tokenizer, chosen)
        return made.complete(PROMPT)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    # One token to choose from: as without sampling.
    assert sample(1, top_k=1) == completer.complete(PROMPT)


TEMPLATE = "{% for m in messages %}# {{ m['content'] }}\n{% endfor %}"


def test_a_chat_answers_each_line(completer, monkeypatch, capsys):
    completer.tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr("halve.completion.Completer.open", lambda *_: completer)
    said = iter(["words", "/new", "more words", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    app(["chat", str(BUNDLED), "--system", "Brief."], standalone_mode=False)
    out = capsys.readouterr().out
    messages = [{"role": "system", "content": "Brief."}]
    expected = [
        completer.reply([*messages, {"role": "user", "content": text}])
        for text in ("words", "more words")
    ]
    assert out == "".join(f"{reply}\n" for reply in expected)


def test_a_chat_needs_a_template(completer, monkeypatch):
    completer.tokenizer.chat_template = None
    monkeypatch.setattr("halve.completion.Completer.open", lambda *_: completer)
    with pytest.raises(HalveError, match="no chat template"):
        app(["chat", str(BUNDLED)], standalone_mode=False)


@pytest.mark.parametrize("command", ["prune", "bench", "generate"])
def test_usage_shows_arguments_without_braces(command, capsys):
    app([command, "--help"], standalone_mode=False)
    usage = capsys.readouterr().out.split("Usage:")[1].splitlines()[0]
    assert "{" not in usage
    assert "[[" not in usage
    assert "MODEL" in usage


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell):
    variables = os.environ | {"_HALVE_COMPLETE": f"source_{shell}"}
    program = "from halve.cli.app import app; app(prog_name='halve')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, check=True
    )
    assert b"_HALVE_COMPLETE" in done.stdout


def test_times_are_those_of_the_clock_here(monkeypatch):
    monkeypatch.setenv("TZ", "Etc/GMT-2")
    import time  # noqa: PLC0415

    time.tzset()
    assert console.local_time("2026-11-27T10:05:06+00:00") == "2026-11-27 12:05:06"
    monkeypatch.undo()
    time.tzset()
