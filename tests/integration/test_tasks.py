"""Tasks of lm-evaluation-harness: its own command and `halve eval` agree."""

import json
import lzma
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec

import pytest

import halve
from halve.cli import main
from halve.cli.eval_tasks import print_task_scores
from halve.errors import HalveError, SourceError
from halve.measure import read_task_scores
from halve.records import TasksRecord
from halve.records.stored import read_measurements
from tests.conftest import PYTHON
from tests.tables import BUNDLED

has_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="halve[tasks] is not installed"
)

# The command; nothing of Halve is named.
STOCK = """
import runpy, sys
tasks, out, folder = sys.argv[1:]
sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}"]
sys.argv += ["--tasks", "which_line", "--include_path", tasks, "--device", "cpu"]
sys.argv += ["--output_path", f"{out}/scores.json"]
runpy.run_module("lm_eval", run_name="__main__")
"""
TASK = """
task: which_line
dataset_path: json
dataset_kwargs: {{data_files: {folder}/questions.jsonl, cache_dir: {folder}/cache}}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{before}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Return a folder with a task: which line of Python follows some others?"""
    folder = tmp_path_factory.mktemp("tasks")
    text = lzma.decompress(PYTHON.read_bytes()).decode()
    lines = [line for line in text.splitlines(True) if line.strip()]
    questions = []
    for at in range(100, 2100, 100):
        answer = at // 100 % 4
        choices = [lines[at + 37 * step] for step in (1, 2, 3)]
        choices.insert(answer, lines[at])
        before = "".join(lines[at - 8 : at])
        questions.append({"before": before, "choices": choices, "answer": answer})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "which_line.yaml").write_text(TASK.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a pruned model, packed and unpacked."""
    home = tmp_path_factory.mktemp("models")
    halve.prune(BUNDLED, home / "packed", solver="magnitude", packed=True)
    halve.unpack(home / "packed", home / "dense")
    return home / "packed", home / "dense"


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs `halve eval`: what it prints, or its error."""

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["halve", "eval", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


@pytest.fixture
def local(monkeypatch):
    """Leave out the thousands of tasks of lm-evaluation-harness, which take seconds."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    manager = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)


@has_lm_eval
@pytest.mark.usefixtures("local")
def test_figures_are_those_of_the_stock_command(
    tasks, folders, installed, run, capsys, tmp_path
):
    """Of packed and dense to the last digit, though there nothing imports Halve."""
    packed, dense = folders
    subprocess.run(
        [sys.executable, "-c", STOCK, tasks, tmp_path, packed],
        check=True,
        capture_output=True,
        env={**installed, "HF_HUB_OFFLINE": "1"},
    )
    [score] = read_task_scores(*tmp_path.glob("scores*.json"))
    assert score.metric == "acc_norm"
    assert 0.3 < score.value < 1
    assert score.stderr is not None
    assert 0 < score.stderr < 0.2

    words = ["--tasks", "which_line", "--include-path", tasks, "--against", dense]
    found = json.loads(run(packed, *words, "--keep", "--json"))
    assert found["model"] == found["reference"] == [asdict(score)]
    assert found["recovery"] == {"which_line": 1.0}
    [kept] = read_measurements(packed)
    assert (kept.kind, kept.reference) == ("tasks", str(dense))
    assert asdict(kept.result) == {
        k: tuple(v) for k, v in found.items() if k in kept.record
    }

    print_task_scores(TasksRecord((score,)), "out", None)
    print_task_scores(TasksRecord((score,), (score,)), "out", "dense")
    alone, against = capsys.readouterr().out.split("out, against dense")
    assert "Score" in alone
    assert "Recovery" not in alone
    assert "100 %" in against


@has_lm_eval
@pytest.mark.usefixtures("local")
def test_a_wrong_task_is_told_before_a_model_is_loaded(tasks):
    with pytest.raises(SourceError, match="Use which_line, or a name"):
        halve.evaluate_tasks("nonesuch", "which_lin", include_path=str(tasks))
    with pytest.raises(SourceError, match="not a folder with tasks"):
        halve.evaluate_tasks("nonesuch", "which_line", include_path="nonesuch")
    with pytest.raises(HalveError, match="limit is 0"):
        halve.evaluate_tasks("nonesuch", "which_line", limit=0)


def test_without_lm_eval_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr("halve.measure.tasks.find_spec", lambda _: None)
    with pytest.raises(HalveError, match=r"pip install 'halve\[tasks\]'"):
        halve.evaluate_tasks("nonesuch", "arc_easy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "3"], "--limit concerns tasks"),
        (["--tasks", "a", "--seq-len", "8"], "--seq-len concerns a text"),
        (["--tasks", "a", "--limit", "3", "--keep"], "not that of a task"),
    ],
)
def test_options_without_effect_are_refused(words, message, run):
    assert message in run(BUNDLED, *words, code=1)
