"""Draws scatter plots as SVG by hand, so that no benchmark needs a plotting library."""

import math
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 560, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 110, 66, 48
_COLORS = ("#c0392b", "#2c6fbb", "#3a8f4d", "#8e5ea2")
_STYLE = "font-family: sans-serif; font-size: 11px; fill: #222"


@dataclass(frozen=True)
class Point:
    """A labelled point of a panel."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Panel:
    """A plot.

    Attributes:
        title: Above it.
        x_name: Below it.
        series: Name -> points; each series has a color.
        log: Whether the vertical axis is logarithmic.
    """

    title: str
    x_name: str
    series: dict[str, list[Point]]
    log: bool = False


def draw(panels: list[Panel]) -> str:
    """Return an SVG with the panels side by side."""
    width = _WIDTH * len(panels)
    body = [line for i, panel in enumerate(panels) for line in _panel(panel, i)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
            f'height="{_HEIGHT}" viewBox="0 0 {width} {_HEIGHT}" style="{_STYLE}">',
            '<rect width="100%" height="100%" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


class _Axis:
    """Maps values to positions.

    Attributes:
        ticks: Values to mark.
    """

    def __init__(
        self, values: list[float], start: float, end: float, log: bool
    ) -> None:
        self._scale = math.log10 if log else float
        self.ticks = _log_ticks(values) if log else _ticks(values)
        low, high = self._scale(self.ticks[0]), self._scale(self.ticks[-1])
        self._at = lambda v: start + (end - start) * (v - low) / (high - low)

    def position(self, value: float) -> float:
        """Return where a value lies, in pixels."""
        return round(self._at(self._scale(value)), 1)


def _ticks(values: list[float]) -> list[float]:
    """Return round numbers around the values, about five of them."""
    low, high = min(values), max(values)
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / 2))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (f * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * n, 9) for n in range(first, max(last, first + 1) + 1)]


def _log_ticks(values: list[float]) -> list[float]:
    """Return the numbers 1, 2 and 5 times powers of ten around positive values."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_numbers = [float(f"{f}e{power}") for power in powers for f in (1, 2, 5)]
    first = max((n for n in round_numbers if n <= low), default=round_numbers[0])
    last = min((n for n in round_numbers if n >= high), default=round_numbers[-1])
    return [n for n in round_numbers if first <= n <= last]


def _panel(panel: Panel, index: int) -> list[str]:
    """Return the elements of a panel: frame, axes, points, legend."""
    points = [point for series in panel.series.values() for point in series]
    left, right = _WIDTH * index + _LEFT, _WIDTH * (index + 1) - _RIGHT
    top, bottom = _TOP, _HEIGHT - _BOTTOM
    x = _Axis([p.x for p in points], left, right, False)
    y = _Axis([p.y for p in points], bottom, top, panel.log)
    lines = [_text(left, top - 46, panel.title, "start", bold=True)]
    lines += [_text((left + right) / 2, bottom + 36, panel.x_name, "middle")]
    for tick in x.ticks:
        lines += [_line(x.position(tick), bottom, x.position(tick), top)]
        lines += [_text(x.position(tick), bottom + 16, f"{tick:g}", "middle")]
    for tick in y.ticks:
        lines += [_line(left, y.position(tick), right, y.position(tick))]
        lines += [_text(left - 6, y.position(tick) + 4, f"{tick:g}", "end")]
    for number, (name, series) in enumerate(panel.series.items()):
        color = _COLORS[number % len(_COLORS)]
        # Labels are beside the dots of one series and above those of the next, so that
        # neighbors of two series do not cover each other.
        lines += _series(series, x, y, color, above=number % 2 == 1)
        lines += [_dot(left + 4 + 90 * number, top - 28, color)]
        lines += [_text(left + 12 + 90 * number, top - 24, name, "start")]
    return lines


def _series(
    series: list[Point], x: _Axis, y: _Axis, color: str, above: bool
) -> list[str]:
    """Return dots with their labels."""
    lines: list[str] = []
    for point in series:
        at = (x.position(point.x), y.position(point.y))
        label = _text(
            at[0] + 7, at[1] - 6 if above else at[1] + 4, point.label, "start"
        )
        lines += [_dot(*at, color), label]
    return lines


def _dot(x: float, y: float, color: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
