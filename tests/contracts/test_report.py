"""A page shows what the facts hold, is whole and harmless, and the same each time."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from math import exp, log10

import pytest
import yaml
from huggingface_hub import ModelCard

from halve.errors import CheckpointError
from halve.records import ModelRecord, PackRecord, SpeedRecord
from halve.reporting import render, render_card, render_eval_results
from halve.reporting.card import CARD_MARK
from halve.reporting.numbers import (
    counted,
    linear_ticks,
    log_ticks,
    moment,
    significant,
    with_error,
)
from halve.reporting.provenance import commands, prune_command
from halve.reporting.summary import perplexity_difference, speedup
from tests.report_facts import (
    BENCH,
    CASES,
    COMPARISON,
    EVERYTHING,
    HOSTILE,
    SAMPLES,
    TASKS,
    facts,
    pruned,
)

SECTIONS = (
    *("verdict", "figures", "matrices", "blocks", "predictions", "texts", "size"),
    *("speed", "tasks", "provenance", "limits"),
)
# Elements that have no end.
VOID = {"meta", "br"}
# Attributes that load, link or run something.
ACTIVE = re.compile(r"on\w+|src|srcset|href|action|data|xlink:href|style")


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.text = [], [], [], []
        self.attributes = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += [name for name, _ in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and "svg" not in self.open:
            self.text.append(data)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_the_same_facts_give_the_same_bytes(case):
    assert render(case) == render(replace(case))
    assert render_card(case) == render_card(replace(case))


def test_a_page_is_whole_and_inert(case):
    text = render(case)
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint(
        {"script", "link", "img", "iframe", "object", "base", "form", "a", "use"}
    )
    assert not [name for name in page.attributes if ACTIVE.fullmatch(name)]
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]


def test_everything_known_has_its_section():
    ids = Page(render(CASES["everything"])).ids
    assert set(SECTIONS) <= set(ids)
    assert [i for i in ids if i in SECTIONS] == list(SECTIONS)


def test_what_is_not_known_is_left_out():
    text = render(CASES["nothing measured"])
    ids = set(Page(text).ids)
    assert ids.isdisjoint({"predictions", "texts", "speed", "tasks"})
    assert {"verdict", "figures", "matrices", "size", "provenance", "limits"} <= ids
    assert text.count("<strong>not measured</strong>") == 4
    assert "halve report half --measure --against owner/dense" in text
    alone = facts(pruned(), COMPARISON.model)
    text = render(alone)
    assert text.count("<strong>not measured</strong>") == 3
    assert "<strong>29.12 ± 0.25</strong>" in text
    ids = set(Page(render(CASES["no record of pruning"])).ids)
    assert ids.isdisjoint({"matrices", "blocks", "allocation"})


@pytest.mark.parametrize("name", ["everything", "96 x 7", "one block, one matrix"])
def test_a_cell_is_a_matrix(name):
    case = CASES[name]
    assert case.pruned is not None
    page = render(case)
    [figure] = re.findall(r'<figure id="figure-errors">.*?</figure>', page, re.S)
    cells = re.findall(r"<path [^>]*><title>([^<]*)</title></path>", figure)
    names = [m.tensor for m in case.pruned.all_matrices]
    assert [f"{cell.split()[0]}.weight" for cell in cells] == names
    rows = re.findall(r"<tr><td>(model[^<]*)</td>", page)
    assert rows == names


def test_experts_of_one_name_are_one_cell():
    case = CASES["8 experts"]
    page = render(case)
    [figure] = re.findall(r'<figure id="figure-errors">.*?</figure>', page, re.S)
    titles = re.findall(r"<title>([^<]*)</title>", figure)
    assert len(titles) == 4 * 3
    assert all("experts.*." in t and "8 experts" in t for t in titles)
    assert case.pruned is not None
    matrices = case.pruned.blocks[0].matrices
    first = [m.held_out or 0 for m in matrices if m.tensor.endswith("w1.weight")]
    mean, highest = (significant(100 * x) for x in (sum(first) / 8, max(first)))
    assert f"mean {mean} %, maximum {highest} %" in titles[0]


def test_a_large_page_is_small_enough():
    assert len(render(CASES["96 x 7"]).encode()) <= 300 * 2**10


def test_commands_can_be_pasted():
    case = replace(CASES["nothing measured"], name="a b; rm -r $HOME")
    for command in ("prune owner/dense -o", "verify", "report", "bench"):
        assert f"halve {command} &#39;a b; rm -r $HOME&#39;" in render(case)


def test_names_and_texts_stay_text():
    page = render(CASES["hostile"])
    assert "<script" not in page
    assert "\x07" not in page
    shown = "".join(Page(page).text)
    harmless = HOSTILE.replace("\x07", "\ufffd").replace("\u202e", "\ufffd")
    assert harmless in shown
    card = render_card(CASES["hostile"])
    body = card.split(CARD_MARK)[1]
    code = re.sub(r"`[^`\n]*`|^    .*$", "", body, flags=re.M)
    assert not re.search(r"(?<!\\)<", code)
    metadata = ModelCard(card).data.to_dict()
    assert metadata["license"] == HOSTILE
    assert "base_model" not in metadata


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"]
)
def test_what_is_not_finite_is_refused(value):
    for result in (
        replace(COMPARISON, kl_mean=value),
        replace(BENCH, bandwidth=value),
        replace(BENCH, results=(SpeedRecord("torch", "tg1", 1, 1, (value,), 1),)),
    ):
        with pytest.raises(CheckpointError, match="not finite"):
            facts(pruned(), result)


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def numbers_of(value):
    """Yield all numbers of nested values, those in strings too."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, str):
        yield from map(to_number, NUMBER.findall(value))
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers_of(name)
            yield from numbers_of(inner)
    else:
        for inner in value:
            yield from numbers_of(inner)


def to_number(text):
    return float(text.replace(",", ""))


def is_rounded_from(text, known):
    """Whether a number is one of those known, or 100 or 1/1024 of it, rounded."""
    mantissa, _, power = text.replace(",", "").partition("e")
    digits = len(mantissa.partition(".")[2])
    step = 10.0 ** (int(power or 0) - digits)
    value = float(f"{mantissa}e{power or 0}")
    scales = (1, 100, 2**-10, 2**-20, 2**-30, 1e-9)
    # Three significant digits are shown of integers above a thousand, too.
    step = max(step, 0.0)
    return any(abs(n * s - value) <= 0.5000001 * step for n in known for s in scales)


# What a page computes: here once more, plainly.
def derived(case):
    record, compared = case.pruned, COMPARISON
    yield from perplexity_difference(compared)
    zeros = sum(m.sparsity * m.rows * m.columns for m in record.all_matrices)
    yield zeros / case.sizes.prunable
    yield len(record.all_matrices)
    yield sum(b.seconds for b in record.blocks)
    yield 128 * 512
    yield 2**30 * 3 / 4 / 2**30
    yield case.sizes.stored.total
    yield 8 * case.sizes.stored.matrices / case.sizes.prunable
    for result in BENCH.results:
        yield from (result.median, result.mean, result.deviation)
        yield result.bandwidth / BENCH.bandwidth
    faster = speedup(BENCH)
    assert faster is not None
    yield faster.ratio
    yield sum(COMPARISON.kl_histogram)
    for score, other in zip(TASKS.model, TASKS.reference, strict=False):
        yield score.value / other.value
    dense, left = (0.75 + 0.625) / 2, (0.625 + 0.5) / 2
    yield from (dense, left, left / dense)
    yield from (1, 2)  # what differs in the passage; how many have both scores


def test_every_number_is_in_the_facts():
    case = facts(pruned(1, ("fc1", "fc2")), *EVERYTHING)
    known = [*numbers_of(case.to_dict()), *derived(case)]
    text = " ".join(Page(render(case)).text).replace("SHA-256", "")
    # The steps of colours, and what explains divergence, tests and 16-bit models.
    own = {"0", "0.01", "0.05", "0.2", "1", "16", "4"}
    found = [n for n in NUMBER.findall(text) if n not in own]
    assert len(found) > 90
    assert [n for n in found if not is_rounded_from(n, known)] == []
    assert not is_rounded_from("27.91", known)


def test_the_error_of_a_difference_is_that_of_a_jackknife():
    losses = [
        (3.1 + 0.05 * (i * 7 % 11), 3.0 + 0.05 * (i * 7 % 11) + 0.01 * (i % 3))
        for i in range(40)
    ]

    def difference(pairs):
        means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        return exp(means[0]) - exp(means[1])

    record = replace(
        COMPARISON,
        model=replace(
            COMPARISON.model,
            losses=tuple(a for a, _ in losses),
            perplexity=2.718281828459045 ** (sum(a for a, _ in losses) / 40),
        ),
        reference=replace(
            COMPARISON.reference,
            losses=tuple(b for _, b in losses),
            perplexity=2.718281828459045 ** (sum(b for _, b in losses) / 40),
        ),
    )
    left_out = [difference(losses[:i] + losses[i + 1 :]) for i in range(40)]
    mean = sum(left_out) / 40
    jackknife = (39 / 40 * sum((d - mean) ** 2 for d in left_out)) ** 0.5
    value, error = perplexity_difference(record)
    assert value == pytest.approx(difference(losses))
    assert error == pytest.approx(jackknife, rel=0.02)
    single = replace(record, model=replace(record.model, losses=(3.0,)))
    assert perplexity_difference(single)[1] is None


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (14.9312, 0.0631, "14.931 ± 0.063"),
        (0.049595, 0.001211, "0.0496 ± 0.0012"),
        (86.95, 0.38, "86.95 ± 0.38"),
        (158.4, 35.2, "158 ± 35"),
        (27.626, None, "27.63"),
        (27.626, 0.0, "27.63"),
    ],
)
def test_a_value_has_the_digits_of_its_error(value, error, shown):
    assert with_error(value, error) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (50.004, "50"),
        (0.04959, "0.0496"),
        (123456, "123456"),
        (99.96, "100"),
        (0.09996, "0.1"),
        (1e-5, "1e-05"),
        (3.72e-5, "3.72e-05"),
        (-0.25, "-0.25"),
    ],
)
def test_three_digits_are_significant(value, shown):
    assert significant(value) == shown


@pytest.mark.parametrize("highest", [1e-6, 0.07, 0.5, 1, 3.3, 99, 12345.6])
def test_linear_ticks_enclose_the_values(highest):
    ticks = linear_ticks(highest)
    steps = {round(b - a, 12) for a, b in pairwise(ticks)}
    assert ticks[0] == 0 and ticks[-1] >= highest * 0.999
    assert 2 <= len(ticks) <= 7
    assert max(steps) == pytest.approx(min(steps))


@pytest.mark.parametrize("lowest", [1e-7, 0.02, 0.1, 1.0, 37.0])
@pytest.mark.parametrize("ratio", [1.0, 1.5, 9.0, 80.0, 1e4, 1e9])
def test_log_ticks_enclose_the_values(lowest, ratio):
    ticks = log_ticks(lowest, lowest * ratio)
    assert ticks[0] <= lowest and lowest * ratio <= ticks[-1]
    assert len(set(ticks)) == len(ticks) >= 2
    assert log10(ticks[-1] / ticks[0]) <= log10(ratio) + 2


def test_counts_and_times_are_words():
    assert (counted(1, "thread"), counted(2000, "thread")) == (
        "1 thread",
        "2,000 threads",
    )
    assert moment("2026-11-28T01:02:03+00:00") == "2026-11-28 01:02:03 UTC"
    assert moment("some day") == "some day"
    page = render(CASES["everything"])
    assert "2026-11-28 01:02:03 UTC" in page
    assert "T01:02:03" not in page


def test_the_command_names_what_differs_from_the_defaults():
    record = pruned()
    identity = record.identity | {
        "sequential": False,
        "refine": True,
        "symmetric": True,
        "rules": ["a b=70%", "c=2:4"],
        "skip": [],
        "device": "cpu",
    }
    command = prune_command(replace(record, identity=identity), "an out")
    assert command.startswith("halve prune owner/dense -o 'an out' --")
    for words in (
        "--seed 7",
        "--seq-len 512",
        "--no-sequential",
        "--refine",
        "--rule 'a b=70%' --rule c=2:4",
        "--calibration wikitext2",
    ):
        assert words in command
    for words in ("--device", "--samples", "--symmetric", "--skip", "--sparsity"):
        assert words not in command


def test_the_metadata_of_a_card():
    card = ModelCard(render_card(CASES["everything"]))
    assert card.data.to_dict() == {
        "base_model": "owner/dense",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["halve", "pruned", "sparse", "admm"],
    }
    assert card.text.lstrip().startswith(CARD_MARK)
    packed = ModelCard(render_card(CASES["packed"]))
    assert packed.data.to_dict()["library_name"] == "halve"
    assert "pip install halve" in packed.text
    assert "license" not in packed.data.to_dict()


@pytest.mark.parametrize(
    ("name", "revision"), [("/home/me/dense", "0123"), ("dense", ""), ("../m", "01")]
)
def test_only_a_model_on_the_hub_is_a_base_model(name, revision):
    record = pruned(1, model=ModelRecord(name, revision, "llama", 1))
    assert "base_model" not in ModelCard(render_card(facts(record))).data.to_dict()


def test_scores_become_results_of_the_hub():
    results = render_eval_results(CASES["everything"])
    assert set(results) == {".eval_results/piqa.yaml", ".eval_results/arc_easy.yaml"}
    [entry] = yaml.safe_load(results[".eval_results/piqa.yaml"])
    assert entry["dataset"] == {"id": "owner/piqa", "task_id": "piqa"}
    assert entry["value"] == 0.625
    assert render_eval_results(CASES["hostile"]) == {}


def test_the_beginning_that_is_common_is_not_marked():
    page = render(CASES["everything"])
    assert "The road</span> to<mark> nowhere</mark></pre>" in page
    assert "The road</span> to<mark> Rome</mark></pre>" in page
    assert "The first 1 of 2 tokens are the same." in page
    assert "All 1 tokens are the same." in page
    assert SAMPLES.continuations[0].same == 1


def test_a_packed_record_shows_both_sizes():
    assert isinstance(CASES["packed"].packed, PackRecord)
    text = "".join(Page(render(CASES["packed"])).text)
    assert "1.61 KiB → 947 B" in text
    assert "9 bits a weight" in text
    first, second = commands(CASES["packed"])
    assert first.startswith("halve prune owner/dense -o half-source ")
    assert second == "halve pack half-source -o half"
    assert f"{first}\n{second}" in text
