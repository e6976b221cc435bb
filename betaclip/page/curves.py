"""The curves of runs as panels of lines, in the coordinates of an SVG."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from matplotlib.ticker import LogLocator, MaxNLocator

from betaclip.page.results import headlines
from betaclip.training.artifacts import LOGARITHMIC, PANELS, fits

WIDTH, HEIGHT = 360, 210  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 26  # its margins
COLOURS = 8  # in style.css
MAX_POINTS = 600  # of a line

Rows = Sequence[Mapping[str, float]]
Point = tuple[float, float]  # step, value


class Line(NamedTuple):
    """A metric of a run: its label, the numbers of its colour and its style, and its points."""

    label: str
    colour: int
    style: int
    points: list[Point]


class Tick(NamedTuple):
    place: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to coordinates from ``begin`` to ``end``."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    @classmethod
    def around(cls, values: Sequence[float], begin: float, end: float, *, logarithmic: bool = False) -> "Axis":
        """An axis that holds all values; on a logarithmic one those that are not positive lie at its lower end."""
        logarithmic = logarithmic and max(values) > 0
        kept = [value for value in values if value > 0] if logarithmic else values
        low, high = min(kept), max(kept)
        if low == high:
            low, high = (low / 2, high * 2) if logarithmic else (low - (abs(low) or 1), high + (abs(high) or 1))
        return cls(low, high, begin, end, logarithmic)

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(max(value, self.low)))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        return round(self.begin + (value - low) / (high - low) * (self.end - self.begin), 1)

    def ticks(self, count: int, *, integer: bool = False) -> list[Tick]:
        """About ``count`` round values."""
        powers = self.logarithmic and self.high > 10 * self.low
        locator = LogLocator(numticks=count) if powers else MaxNLocator(count, integer=integer)
        values = [float(v) for v in locator.tick_values(self.low, self.high) if self.low <= v <= self.high]
        return [Tick(self(value), f"{value:g}") for value in values]


@dataclass(frozen=True)
class Panel:
    """A title with a note, lines, and the axes that they are drawn on."""

    title: str
    note: str
    lines: list[Line]
    x: Axis
    y: Axis

    def polyline(self, line: Line) -> str:
        """The points of a line as SVG takes them."""
        return " ".join(f"{self.x(step)},{self.y(value)}" for step, value in line.points)

    @property
    def data(self) -> dict[str, Any]:
        """The data with which the page's script shows the values of a step."""
        lines = [[[step, float(f"{value:.4g}")] for step, value in line.points] for line in self.lines]
        return {"first": self.x.low, "last": self.x.high, "lines": lines}

    @property
    def description(self) -> str:
        """The panel in words."""
        changes = (f"{line.label} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in self.lines)
        return f"{self.title} by step: {', '.join(changes)}"


def panels(metrics: Mapping[str, Rows]) -> list[Panel]:
    """A panel for each kind of metric that was logged.

    metrics: by the names of the runs, what :func:`betaclip.training.log.read_metrics` returns.
    """
    losses, *others = PANELS
    evaluated = {name for rows in metrics.values() for row in rows for name in _headlines(row)}
    found = [
        _panel(losses, "", metrics, partial(fits, affix=PANELS[losses])),
        _panel(
            "evaluations", "% right, during the run", metrics,
            lambda name: name in evaluated, factor=100,
        ),
        _panel(
            "leak", "% of texts identified from what they pool from another picture; lower is better", metrics,
            lambda name: name == "leak", factor=100,
        ),
        *(_panel(title, "", metrics, partial(fits, affix=PANELS[title])) for title in others),
        _panel("images per second", "", metrics, lambda name: name == "images_per_s"),
    ]  # fmt: skip
    return [panel for panel in found if panel is not None]


def _headlines(row: Mapping[str, float]) -> Iterator[str]:
    """The names of the shares of right answers in an evaluation that was made during a run."""
    sets: dict[str, dict[str, float]] = {}
    for name, value in row.items():
        if name.count("/") >= 2:
            found, task, rest = name.rsplit("/", 2)
            sets.setdefault(found, {})[f"{task}/{rest}"] = value
    for found, values in sets.items():
        yield from (f"{found}/{key}" for key, *_ in headlines(values) if not key.startswith(("pointing/", "leak/")))


def _panel(
    title: str, note: str, metrics: Mapping[str, Rows], wants: Callable[[str], bool], *, factor: float = 1
) -> Panel | None:
    lines = list(_lines(metrics, wants, factor))
    if not lines:
        return None
    steps, values = zip(*chain.from_iterable(line.points for line in lines), strict=True)
    x = Axis.around(steps, LEFT, WIDTH - RIGHT)
    y = Axis.around(values, HEIGHT - BOTTOM, TOP, logarithmic=title in LOGARITHMIC)
    return Panel(title, note, lines, x, y)


def _lines(metrics: Mapping[str, Rows], wants: Callable[[str], bool], factor: float) -> Iterator[Line]:
    """A colour means a metric, a style means a run."""
    names = dict.fromkeys(name for rows in metrics.values() for row in rows for name in row if wants(name))
    for colour, name in enumerate(names):
        for style, (run, rows) in enumerate(metrics.items()):
            points = [(row["step"], factor * row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
            if points:
                label = name if len(metrics) == 1 else f"{name}, {run}"
                yield Line(label, colour % COLOURS, style, _thinned(points))


def _thinned(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS: the first and the last, and of each few points in a row the lowest and the highest, so that
    no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / (MAX_POINTS - 2))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    ends = {points[0], points[-1]}
    return sorted(ends.union(*({min(group, key=_value), max(group, key=_value)} for group in groups)))


def _value(point: Point) -> float:
    return point[1]
