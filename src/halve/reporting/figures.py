"""The five figures of a page: from facts to shapes."""

from collections.abc import Sequence
from math import log10

from halve.quantities import size
from halve.records import BenchRecord, BlockRecord, ComparisonRecord, SpeedRecord
from halve.reporting.facts import Parts
from halve.reporting.heat import HeatMap
from halve.reporting.numbers import (
    linear_ticks,
    log_ticks,
    percent,
    significant,
    with_error,
)
from halve.reporting.shapes import WIDTH, Box, Dot, Figure, Label, Line

_LEFT = 46.0  # of what is drawn, right of the labels of an axis
_RIGHT = WIDTH - 8
_TURNED = 0.6  # height of a turned label, for each unit of its length
_LETTER = 7.2  # mean width of a letter
_LETTERS = 22  # of the longest label
# Bins of the divergences: see `ComparisonRecord.kl_histogram`.
_LOWEST, _DECADES = -8, 10


def heat_figure(heat: HeatMap, label: str) -> Figure:
    """Return a map with a row for each block and a column for each matrix."""
    columns = [_cut(column) for column in heat.columns]
    longest = max(map(len, columns)) * _LETTER
    turned = longest > (_RIGHT - _LEFT) / len(columns)
    beyond = (
        0.82 * longest + 8 if turned else 0
    )  # of the last label, right of its column
    # A whole number takes fewer bytes, and there may be a thousand cells.
    width = float((_RIGHT - _LEFT - beyond) // (len(columns) - (0.5 if turned else 0)))
    height = 22.0 if len(heat.rows) <= 16 else 15.0 if len(heat.rows) <= 48 else 10.0  # noqa: PLR2004
    top = round(12 + (_TURNED * longest if turned else 6))
    figure = Figure(label, top + height * len(heat.rows) + 46)
    for index, column in enumerate(columns):
        x = _LEFT + width * (index + 0.5)
        figure.add(Label(x, top - 6, column, "start" if turned else "middle", turned))
    every = max(round(16 / height), 1)
    for index, row in enumerate(heat.rows):
        y = top + height * index
        if index % every == 0:
            figure.add(Label(_LEFT - 6, y + height / 2 + 4, row, "end"))
        for place, cell in enumerate(heat.cells[index]):
            if cell is not None:
                x = _LEFT + width * place
                opacity = heat.strength(cell.value)
                style = "" if cell.value is not None else "none"
                box = Box(x, y, width - 1, height - 1, style, cell.title, opacity)
                figure.add(box)
    _add_legend(figure, heat, figure.height - 30)
    return figure


def _add_legend(figure: Figure, heat: HeatMap, y: float) -> None:
    """Add the colours of five values from zero to the largest."""
    digits = 2 if heat.lowest else None
    for step, value in enumerate(heat.legend()):
        x = _LEFT + 80 * step
        figure.add(Box(x, y, 79, 10, "", "", heat.strength(value)))
        figure.add(Label(x + 39, y + 24, percent(value, digits), "middle"))


def blocks_figure(blocks: Sequence[BlockRecord]) -> Figure | None:
    """Return the output error of each block, and how it was refined.

    None if no error was measured.
    """
    values = [b.error for b in blocks if b.error]
    values += [error**0.5 for b in blocks for error in b.refined or () if error]
    if not values:
        return None
    ticks = log_ticks(min(values), max(values))
    figure = Figure("Output error of each block, on a logarithmic axis", 216)
    bottom, top = 176.0, 12.0

    def y_of(value: float) -> float:
        low, high = log10(ticks[0]), log10(ticks[-1])
        return bottom - (log10(value) - low) / (high - low) * (bottom - top)

    for tick in ticks:
        y = y_of(tick)
        figure.add(Line(_LEFT, y, _RIGHT, y, "grid"))
        figure.add(Label(_LEFT - 6, y + 4, percent(tick), "end"))
    step = (_RIGHT - _LEFT) / len(blocks)
    for index, block in enumerate(blocks):
        x = _LEFT + step * (index + 0.5)
        if block.error:
            title = f"{block.name}: {percent(block.error)}"
            figure.add(Dot(x, y_of(block.error), "dot", title))
        if block.refined and all(block.refined):
            before, after = (error**0.5 for error in block.refined)
            title = f"{block.name}: refined from {percent(before)} to {percent(after)}"
            places = (x + step / 4, y_of(before), x + step / 4, y_of(after))
            figure.add(Line(*places, "arrow", title, arrow=True))
    _add_block_numbers(figure, len(blocks), bottom + 18)
    return figure


def sparsities_figure(sparsities: Sequence[float], names: Sequence[str]) -> Figure:
    """Return the fraction of zeros of each block as bars from zero."""
    figure = Figure("Sparsity of each block", 134)
    bottom, top = 94.0, 10.0
    ticks = linear_ticks(max(sparsities), 2)
    scale = (bottom - top) / ticks[-1]
    for tick in ticks:
        y = bottom - tick * scale
        figure.add(Line(_LEFT, y, _RIGHT, y, "grid"))
        figure.add(Label(_LEFT - 6, y + 4, percent(tick), "end"))
    step = (_RIGHT - _LEFT) / len(sparsities)
    for index, (sparsity, name) in enumerate(zip(sparsities, names, strict=True)):
        height = sparsity * scale
        x, title = _LEFT + step * index + step / 8, f"{name}: {percent(sparsity)} zeros"
        figure.add(Box(x, bottom - height, step * 0.75, height, "bar", title))
    _add_block_numbers(figure, len(sparsities), bottom + 18)
    return figure


def _add_block_numbers(figure: Figure, count: int, y: float) -> None:
    step = (_RIGHT - _LEFT) / count
    every = max(round(28 / step), 1)
    for index in range(0, count, every):
        figure.add(Label(_LEFT + step * (index + 0.5), y, str(index), "middle"))
    figure.add(Label(WIDTH / 2, y + 16, "block", "middle"))


def divergence_figure(record: ComparisonRecord) -> Figure:
    """Return the histogram of the divergence of each token, on a logarithmic axis."""
    counts = record.kl_histogram
    total = sum(counts)
    figure = Figure("Share of tokens by divergence, on a logarithmic axis", 236)
    bottom, top = 186.0, 44.0
    filled = [index for index, number in enumerate(counts) if number]
    first, last = max(filled[0] - 1, 0), min(filled[-1] + 1, len(counts) - 1)
    width = (_RIGHT - _LEFT) / (last - first + 1)
    ticks = linear_ticks(max(counts) / total, 3)
    for tick in ticks:
        y = bottom - tick / ticks[-1] * (bottom - top)
        figure.add(Line(_LEFT, y, _RIGHT, y, "grid"))
        figure.add(Label(_LEFT - 6, y + 4, percent(tick), "end"))
    for index in range(first, last + 1):
        height = counts[index] / total / ticks[-1] * (bottom - top)
        title = f"{_bin_name(index)}: {percent(counts[index] / total)} of tokens"
        x = _LEFT + width * (index - first)
        figure.add(Box(x, bottom - height, width - 1, height, "bar", title))
    per_decade = (len(counts) - 1) / _DECADES

    def x_of(power: float) -> float:
        return _LEFT + width * (1 - first + (power - _LOWEST) * per_decade)

    every = 2 if (last - first) / per_decade > 6 else 1  # noqa: PLR2004
    for power in range(_LOWEST, _LOWEST + _DECADES + 1, every):
        if _LEFT <= (x := x_of(power)) <= _RIGHT:
            text = significant(10.0**power)
            figure.add(Line(x, bottom, x, bottom + 5, "axis"))
            at_end = x > _RIGHT - len(text) * _LETTER / 2
            anchor = "end" if at_end else "middle"
            figure.add(Label(min(x, _RIGHT), bottom + 18, text, anchor))
    figure.add(Line(_LEFT, bottom, _RIGHT, bottom, "axis"))
    figure.add(
        Label(WIDTH / 2, bottom + 36, "KL divergence of a token, nats", "middle")
    )
    marks = (
        ("median", record.kl_median),
        ("mean", record.kl_mean),
        ("99 %", record.kl_99),
        ("99.9 %", record.kl_quantiles["99.9"]),
    )
    for index, (name, value) in enumerate(marks):
        if value > 0:
            x = min(max(x_of(log10(value)), _LEFT), _RIGHT)
            y = 12.0 + 14 * (index % 2)
            title = f"{name}: {significant(value)} nats"
            figure.add(Line(x, y + 3, x, bottom, "mark", title))
            anchor = "end" if name in ("median", "99 %") else "start"
            figure.add(Label(x, y, name, anchor))
    return figure


def _bin_name(index: int) -> str:
    """Return the range of a bin of `ComparisonRecord.kl_histogram`."""
    if index == 0:
        return f"below {significant(10.0**_LOWEST)}"
    width = _DECADES / 48
    ends = [10.0 ** (_LOWEST + width * (index - 1 + offset)) for offset in (0, 1)]
    return " to ".join(significant(end) for end in ends)


def sizes_figure(rows: Sequence[tuple[str, Parts]]) -> Figure:
    """Return stacked bars of the bytes of a model in several forms."""
    figure = Figure("Bytes of the model by what they are for", 34.0 * len(rows) + 30)
    left, right = 74.0, WIDTH - 76
    largest = max(parts.total for _, parts in rows)
    for index, (name, parts) in enumerate(rows):
        y, x = 6 + 34.0 * index, left
        figure.add(Label(left - 8, y + 17, name, "end"))
        named = (
            ("embeddings and head", "part1", parts.embeddings),
            ("prunable matrices", "part2", parts.matrices),
            ("rest", "part3", parts.rest),
        )
        for part, style, count in named:
            width = count / largest * (right - left)
            title = f"{name}, {part}: {size(count)}"
            figure.add(Box(x, y, width, 24, style, title))
            x += width
        figure.add(Label(x + 6, y + 17, size(parts.total)))
    x, y = left, 34.0 * len(rows) + 12
    for part, style in (
        ("embeddings and head", "part1"),
        ("prunable matrices", "part2"),
        ("rest", "part3"),
    ):
        figure.add(Box(x, y, 11, 11, style))
        figure.add(Label(x + 16, y + 10, part))
        x += 30 + len(part) * _LETTER * 1.1  # in a narrow window letters are larger
    return figure


def speed_figure(record: BenchRecord) -> Figure:
    """Return the tokens per second of each backend in each test, with deviations."""
    tests = list(dict.fromkeys(result.test for result in record.results))
    backends = list(dict.fromkeys(result.backend for result in record.results))
    height = 26.0 + 17 * len(backends)
    figure = Figure("Tokens per second by test", height * len(tests) + 4)
    left, right = 118.0, WIDTH - 86
    for place, test in enumerate(tests):
        results = [result for result in record.results if result.test == test]
        # Each test has a scale of its own: a prompt runs ten times as fast as a reply.
        highest = max(result.mean + result.deviation for result in results)
        y = height * place
        figure.add(Label(8, y + 16, test))
        for index, result in enumerate(results):
            scale = (right - left) / highest
            _add_rate(figure, result, y + 22 + 17 * index, (left, scale))
    return figure


def _add_rate(
    figure: Figure, result: SpeedRecord, y: float, scale: tuple[float, float]
) -> None:
    left, per_token = scale
    length = result.mean * per_token
    text = with_error(result.mean, result.deviation)
    title = f"{result.backend}, {result.test}: {text} tokens/s"
    style = "bar" if "packed" in result.backend else "plain"
    figure.add(Label(left - 8, y + 11, _short(result.backend), "end"))
    figure.add(Box(left, y, length, 13, style, title))
    half = result.deviation * per_token
    ends = (max(length - half, 0), length + half)
    figure.add(Line(left + ends[0], y + 6.5, left + ends[1], y + 6.5, "spread"))
    figure.add(Label(left + ends[1] + 6, y + 11, text))


def _short(backend: str) -> str:
    return _cut(backend.replace(", int8 activations", ", int8"))


def _cut(name: str) -> str:
    """Return the end of a name that is too long for a label."""
    return name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"


def is_varying(sparsities: Sequence[float], points: float = 0.005) -> bool:
    """Whether sparsities differ by more than half a point."""
    return max(sparsities) - min(sparsities) > points
