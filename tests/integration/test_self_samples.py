"""Calibration windows that the model samples itself, beside those of a text."""

from typing import Any

import pytest

import halve
from halve.errors import HalveError
from halve.options import PruneOptions, preset_options
from halve.pruning.plan import make_plan
from halve.pruning.windows import calibration_windows
from tests.interruptions import Stopped, digests, stop_at

SIZES: dict[str, Any] = {"samples": 8, "seq_len": 16, "device": "cpu"}


def drawn(model, **options) -> list[tuple[int, ...]]:
    """Return the windows of a run."""
    plan = make_plan(model, PruneOptions(**SIZES | options))
    ids = calibration_windows(plan, trust_remote_code=False).ids
    assert ids is not None
    return [tuple(window) for window in ids.tolist()]


@pytest.mark.parametrize("row", ["opt", "llama"])
def test_so_many_windows_are_sampled_and_the_others_are_of_the_text(row, pico, text):
    model, of_text = pico(row), {"calibration": str(text)}
    mixed = drawn(model, self_samples=3, **of_text)
    text_alone = drawn(model, samples=5, **of_text)
    own_alone = drawn(model, samples=3, calibration="self")
    assert sorted(mixed) == sorted(text_alone + own_alone)
    assert mixed != text_alone + own_alone  # else those held out would be of one kind
    for same in (3, "3", "40%"):
        assert mixed == drawn(model, self_samples=same, **of_text)
    assert mixed != drawn(model, self_samples=3, seed=1, **of_text)


def test_a_run_with_both_resumes_and_says_so(pico, text, tmp_path):
    options: dict[str, Any] = SIZES | {"calibration": str(text), "self_samples": "50%"}
    record = halve.prune(pico("opt"), tmp_path / "out", **options)
    options["self_samples"] = 4  # the same run, in other words
    with pytest.raises(Stopped):
        halve.prune(pico("opt"), tmp_path / "again", progress=stop_at(8), **options)
    again = halve.prune(pico("opt"), tmp_path / "again", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "again")
    assert record.identity["self_samples"] == 4
    assert again.identity == record.identity
    halve.report(tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "4 windows sampled from the model" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_samples": 8}, "of which some must be of the text"),
        ({"self_samples": -1}, "self_samples is -1"),
        ({"self_samples": "-5%"}, "self_samples is -5%"),
        ({"self_samples": "inf%"}, "self_samples is inf%"),
        ({"self_samples": "some"}, "self_samples is some"),
        ({"self_samples": 2.5}, "self_samples is 2.5"),
        ({"self_samples": "100%"}, "of which some must be of the text"),
        ({"self_samples": 2, "calibration": "self"}, "All windows are sampled"),
        ({"self_samples": "25%", "calibration": "self"}, "--self-samples 0"),
    ],
)
def test_what_leaves_no_text_is_refused(options, message):
    with pytest.raises(HalveError, match=message):
        PruneOptions(**SIZES | {"calibration": "stdlib"} | options).check()


def test_the_best_preset_refines_and_samples_a_quarter():
    options = PruneOptions(**preset_options("best"))
    assert (options.refine, options.sampled, options.samples) == (True, 64, 256)
