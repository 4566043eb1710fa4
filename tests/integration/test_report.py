"""`halve report` end to end: measured, kept, shown, and refused where it must be."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import halve
from halve.cli.app import app
from halve.errors import CheckpointError, HalveError, OutputError, SourceError
from halve.evaluation import compare_passage
from halve.measure import keep_measurement, read_task_scores
from halve.options import EvalOptions, ReportOptions
from halve.records import SamplesRecord, TasksRecord
from halve.records.stored import read_measurements
from halve.reporting import gather_facts, render
from tests.contracts.test_report import SECTIONS, Page
from tests.report_facts import BENCH

RESULTS = {
    "results": {
        "arc": {"acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.25},
        "group": {"acc,none": 0.9},
        "lambada": {"alias": "x", "perplexity,none": 9.5, "acc,none": "N/A"},
        "silent": {"alias": "nothing"},
    },
    "group_subtasks": {"group": ["arc"], "arc": []},
    "n-shot": {"arc": 5},
    "higher_is_better": {"lambada": {"perplexity": False}},
    "configs": {"arc": {"dataset_path": "allenai/ai2_arc"}},
}


@pytest.fixture(scope="module")
def dense(pico):
    return pico("gpt2")


@pytest.fixture(scope="module")
def pruned(dense, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("reported") / "out"
    halve.prune(
        dense,
        out,
        solver="sparsegpt",
        calibration=str(text),
        samples=4,
        seq_len=32,
        allocation="error",
    )
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "results_1.json"
    path.write_text(json.dumps(RESULTS))
    return path


@pytest.fixture(scope="module")
def measured(pruned, dense, text, results, tmp_path_factory):
    out = shutil.copytree(pruned, tmp_path_factory.mktemp("measured") / "out")
    with pytest.MonkeyPatch.context() as patch:
        # `bench` has tests of its own, and takes half a minute.
        patch.setattr("halve.api.reporting.bench", lambda *_, **__: BENCH)
        page = halve.report(
            out,
            measure=True,
            data=str(text),
            seq_len=48,
            segments=3,
            tasks=str(results),
            dense_tasks=str(results),
            card=True,
        )
    assert page == out / "report.html"
    return out


@pytest.fixture
def out(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "out")


def test_a_measured_output_has_all_sections(measured):
    page = Page((measured / "report.html").read_text("utf-8"))
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert "allocation" in page.ids
    assert halve.verify(measured).sound
    assert "made by halve report" in (measured / "README.md").read_text()
    assert (measured / ".eval_results" / "arc.yaml").is_file()


def test_the_same_facts_give_the_same_page(out):
    before = (out / "report.html").read_bytes()
    assert halve.report(out).read_bytes() == before
    assert render(gather_facts(out)).encode() == before


def test_the_dense_model_is_the_recorded_one(measured, dense):
    kept = {m.kind: m for m in read_measurements(measured)}
    assert set(kept) == {"eval", "bench", "samples", "tasks"}
    assert kept["eval"].reference == kept["samples"].reference == str(dense)


@pytest.fixture(scope="module")
def samples(measured):
    [kept] = [m.result for m in read_measurements(measured) if m.kind == "samples"]
    assert isinstance(kept, SamplesRecord)
    return kept


def models_of(measured, dense) -> list[Any]:
    load = AutoModelForCausalLM.from_pretrained
    return [load(folder, dtype=torch.float64).eval() for folder in (measured, dense)]


def test_a_passage_is_what_both_models_predict(samples, measured, dense, text):
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = [token.id for token in samples.passage]
    passage = tokenizer.decode(ids)
    assert text.read_text()[:100].startswith(passage[:100])
    assert "".join(token.text for token in samples.passage) == passage
    assert len(ids) == 48
    with torch.no_grad():
        logits = [m(torch.tensor([ids])).logits[0] for m in models_of(measured, dense)]
    log_q, log_p = (each.log_softmax(-1)[:-1] for each in logits)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    found = torch.tensor([t.kl for t in samples.passage[1:]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    same = log_q.argmax(-1) == log_p.argmax(-1)
    assert [t.same_first for t in samples.passage[1:]] == same.tolist()
    assert samples.passage[0].kl is None


def test_continuations_are_those_of_plain_transformers(samples, measured, dense):
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert len(samples.continuations) == 3
    for model, side in zip(
        models_of(measured, dense), ("model", "reference"), strict=True
    ):
        for continuation in samples.continuations:
            ids = tokenizer(continuation.prompt, return_tensors="pt").input_ids
            tokens = getattr(continuation, side)
            made = model.generate(ids, max_new_tokens=len(tokens), do_sample=False)
            assert [t.id for t in tokens] == made[0, ids.shape[1] :].tolist()
            whole = tokenizer.decode([*ids[0].tolist(), *(t.id for t in tokens)])
            assert whole.endswith("".join(t.text for t in tokens))


def test_characters_of_several_tokens_are_whole(dense, pruned, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("caf\u00e9 \U0001f600 \u05d0\u05d1 na\u00efve " * 200)
    options = EvalOptions(data=str(words), seq_len=40)
    passage = compare_passage(pruned, dense, options)
    shown = "".join(token.text for token in passage.tokens)
    assert words.read_text().startswith(shown)
    assert len(shown) > 10


@pytest.mark.parametrize(
    "name", ["model-00001-of-00004.safetensors", "halve.json", "measurements.json"]
)
def test_a_flipped_bit_is_refused(name, out):
    (out / "report.html").unlink()
    name = name if (out / name).exists() else sorted(out.glob("*.safetensors"))[0].name
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        halve.report(out)
    assert not (out / "report.html").exists()


def test_a_missing_file_is_refused(out):
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json .* is missing"):
        halve.report(out)


def test_a_card_of_someone_else_is_not_overwritten(out):
    (out / "README.md").write_text("My model")
    (out / "report.html").unlink()
    with pytest.raises(OutputError, match=r"README\.md"):
        halve.report(out, card=True)
    assert (out / "README.md").read_text() == "My model"
    assert not (out / "report.html").exists()
    halve.report(out)


def test_a_card_names_the_licence_of_the_dense_card(out, dense, tmp_path):
    model = shutil.copytree(dense, tmp_path / "dense")
    (model / "README.md").write_text("---\nlicense: mit\n---\nText\n")
    assert gather_facts(out, str(model)).license == "mit"
    for text in ("license: mit", "---\n- a\n---\n", "---\nlicense: [a]\n---\n", "\xff"):
        (model / "README.md").write_text(text, "latin-1")
        assert gather_facts(out, str(model)).license == ""


def test_the_command_needs_no_torch(out):
    program = (
        "import sys; from halve.cli.app import app\n"
        f"app(['report', {str(out)!r}, '--card'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_the_command_prints(out, capsys, tmp_path):
    page = (out / "report.html").read_text("utf-8")
    app(["report", str(out), "-o", "-"], standalone_mode=False)
    assert capsys.readouterr().out == page
    app(["report", str(out), "-o", str(tmp_path / "p.html")], standalone_mode=False)
    assert (tmp_path / "p.html").read_text("utf-8") == page
    assert str(tmp_path / "p.html") in capsys.readouterr().out
    app(["report", str(out), "--json"], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == "out"
    assert len(facts["measurements"]) == 4


def test_a_packed_output_shows_how_it_was_pruned(out, tmp_path):
    halve.pack(out, tmp_path / "packed")
    facts = gather_facts(tmp_path / "packed")
    assert facts.pruned == gather_facts(out).pruned
    assert facts.sizes.dense == gather_facts(out).sizes.stored
    assert facts.sizes.stored.total == halve.inspect(tmp_path / "packed").bytes
    ids = Page(halve.report(tmp_path / "packed").read_text("utf-8")).ids
    assert "matrices" in ids


def test_a_model_pruned_and_packed_at_once_knows_its_dense_size(dense, tmp_path):
    halve.prune(dense, tmp_path / "p", solver="magnitude", packed=True, quantize="int4")
    sizes = gather_facts(tmp_path / "p").sizes
    assert sizes.stored.total == halve.inspect(tmp_path / "p").bytes
    assert sizes.dense is not None
    assert sizes.dense.total == halve.inspect(dense).bytes


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        ({"against": "m"}, ("against", "--measure")),
        ({"speed": False}, ("speed", "--measure")),
        ({"dense_tasks": "x"}, ("dense_tasks", "--tasks")),
        ({"measure": True, "segments": 0}, ("segments", "--segments")),
        ({"measure": True, "device": "xpu"}, ("xpu", "--device")),
    ],
)
def test_options_that_do_nothing_are_refused(options, mentions, out):
    with pytest.raises(HalveError) as error:
        halve.report(out, **options)
    for words in mentions:
        assert words in str(error.value)


def test_only_outputs_are_reported(dense, tmp_path):
    with pytest.raises(CheckpointError, match=r"no halve\.json"):
        halve.report(dense)
    with pytest.raises(SourceError, match="does not exist"):
        halve.report("owner/nonesuch")
    with pytest.raises(SourceError):
        halve.report(tmp_path / "nonesuch")


def test_a_page_that_cannot_be_written(out):
    with pytest.raises(OutputError, match="could not be written"):
        halve.report(out, file=str(out / "halve.json" / "page.html"))


def test_an_unknown_dense_model_is_asked_for(out, monkeypatch):
    monkeypatch.setattr("halve.api.reporting.dense_name", lambda _: "")
    with pytest.raises(HalveError, match="--against"):
        halve.report(out, measure=True)


def test_scores_are_read_from_results(results):
    arc, lambada = read_task_scores(results)
    assert (arc.task, arc.metric, arc.value) == ("arc", "acc_norm", 0.25)
    assert (arc.shots, arc.dataset, arc.stderr) == (5, "allenai/ai2_arc", None)
    assert (lambada.metric, lambada.value) == ("perplexity", 9.5)
    assert not lambada.higher_is_better


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"results": []}', '{"results": 3}', "[" * 9999),
        *('{"results": {"a": {}}}', '{"results": {"a": []}}'),
        '{"results": {"a": {"acc,none": NaN}}}',
    ],
    ids=range(9),
)
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(SourceError, match="results"):
        read_task_scores(tmp_path / "r.json")
    with pytest.raises(SourceError):
        read_task_scores(tmp_path / "nonesuch")


def test_tasks_are_kept_without_measuring(pruned, results, tmp_path):
    out = shutil.copytree(pruned, tmp_path / "out")
    options = ReportOptions(tasks=str(results))
    halve.report(out, options=options)
    halve.report(out, options=options)
    [kept] = read_measurements(out)
    assert isinstance(kept.result, TasksRecord)
    assert kept.result.reference == ()
    assert "tasks" in Page((out / "report.html").read_text("utf-8")).ids
    keep_measurement(out, BENCH)
    assert len(read_measurements(out)) == 2
