"""A scatter plot of models as inline SVG: latency on a log scale against a score, with intervals and names.

Colours come from the page's classes (`currentColor`), so that the plot follows the page into dark mode. Kinds differ in
shape as well as in colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["KIND_NAMES", "Point", "draw_mark", "draw_scatter"]

KIND_NAMES = {"baseline": "baseline", "member": "member", "ensemble": "ensemble", "student": "student"}

WIDTH, HEIGHT = 920, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 18, 52
MARK_RADIUS = 6
CHARACTER_WIDTH, LINE_HEIGHT = 6.4, 14  # of the 12 px label font, generous


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model in the plot: where it stands, of which kind, and how sure its score is."""

    name: str
    kind: str
    x: float
    y: float
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        """Shared area with another box."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


def draw_scatter(points: Sequence[Point], *, x_title: str, y_title: str) -> str:
    """Draw the plot.

    Parameters
    ----------
    points : sequence of Point
        At least one; every x above 0.
    x_title, y_title : str
        Of the axes.

    Returns
    -------
    str
        One `<svg>` element.
    """
    x_low, x_high = _padded_log_range([point.x for point in points])
    y_low, y_high, y_step = _nice_range([y for point in points for y in (point.y, *(point.y_interval or ()))])

    def place_x(x: float) -> float:
        share = (math.log10(x) - math.log10(x_low)) / (math.log10(x_high) - math.log10(x_low))
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    description = "; ".join(f"{point.name}: {point.x:.2f} ms, {point.y:.4f}" for point in points)
    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'><title>{escape(description)}</title>"]
    for x in _log_ticks(x_low, x_high):
        at = place_x(x)
        parts.append(f"<line class='grid' x1='{at:.1f}' x2='{at:.1f}' y1='{TOP}' y2='{HEIGHT - BOTTOM}'/>")
        parts.append(f"<text class='tick' x='{at:.1f}' y='{HEIGHT - BOTTOM + 18}' text-anchor='middle'>{x:g}</text>")
    decimals = max(0, -math.floor(math.log10(y_step) + 1e-9))
    for index in range(round((y_high - y_low) / y_step) + 1):
        y = y_low + index * y_step
        at = place_y(y)
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{at:.1f}' y2='{at:.1f}'/>")
        parts.append(f"<text class='tick' x='{LEFT - 8}' y='{at + 4:.1f}' text-anchor='end'>{y:.{decimals}f}</text>")
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f"<text class='axis' x='{middle_x}' y='{HEIGHT - 12}' text-anchor='middle'>{escape(x_title)}</text>")
    parts.append(
        f"<text class='axis' x='16' y='{middle_y}' text-anchor='middle' "
        f"transform='rotate(-90 16 {middle_y})'>{escape(y_title)}</text>"
    )
    frontier = " ".join(f"{place_x(point.x):.1f},{place_y(point.y):.1f}" for point in find_frontier(points))
    parts.append(f"<polyline class='frontier' points='{frontier}'/>")
    for point in points:
        x, y = place_x(point.x), place_y(point.y)
        tip = f"{point.name}: {point.x:.2f} ms, {y_title} {point.y:.4f}"
        parts.append(f"<g class='{point.kind}'><title>{escape(tip)}</title>")
        if point.y_interval:
            low, high = (place_y(edge) for edge in point.y_interval)
            parts.append(
                f"<path d='M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8' "
                "stroke='currentColor' fill='none' opacity='0.55'/>"
            )
        parts.append(f"{draw_mark(point.kind, x, y)}</g>")
    places = [(place_x(point.x), place_y(point.y)) for point in points]
    for point, box in zip(points, _place_labels([point.name for point in points], places), strict=True):
        parts.append(f"<text class='halo' x='{box.left:.1f}' y='{box.bottom - 3:.1f}'>{escape(point.name)}</text>")
    return "".join([*parts, "</svg>"])


def draw_mark(kind: str, x: float, y: float) -> str:
    """Draw a kind's mark around a place: square, circle, diamond or triangle."""
    r = MARK_RADIUS
    if kind == "member":
        return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{r - 1}' fill='currentColor'/>"
    corners = {
        "baseline": [(-r + 1, -r + 1), (r - 1, -r + 1), (r - 1, r - 1), (-r + 1, r - 1)],
        "ensemble": [(0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)],
        "student": [(0, -r - 1), (r, r - 1), (-r, r - 1)],
    }[kind]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f"<polygon points='{points}' fill='currentColor'/>"


def find_frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both latency and score, fastest first."""
    frontier: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not frontier or point.y > frontier[-1].y:
            frontier.append(point)
    return frontier


def _place_labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[_Box]:
    """Put each name beside its mark where it covers least of the marks and of the names put before it."""
    taken = [_Box(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    inside = _Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    boxes = []
    for name, (x, y) in zip(names, places, strict=True):
        width = len(name) * CHARACTER_WIDTH
        candidates = [
            _Box(left, top, left + width, top + LINE_HEIGHT)
            for dy in (0, -14, 14, -28, 28, -42, 42)
            for left, top in ((x + 10, y + dy - LINE_HEIGHT / 2), (x - 10 - width, y + dy - LINE_HEIGHT / 2))
        ]

        def cost(box: _Box, width: float = width) -> float:
            outside = width * LINE_HEIGHT - box.overlap(inside)
            return 10 * outside + sum(box.overlap(other) for other in taken)

        best = min(candidates, key=cost)
        boxes.append(best)
        taken.append(best)
    return boxes


def _padded_log_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.12, 1.3)
    return low / margin, high * margin


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within a range; over more than four decades, the powers alone."""
    factors = (1, 2, 5) if high / low <= 1e4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _nice_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Return a range that holds all values, and a step of 1, 2 or 5 times a power of ten that divides it in 4 to 10."""
    low, high = min(values), max(values)
    span = max(high - low, 0.01)
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    bottom, top = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return min(bottom, top - 1) * step, top * step, step  # equal values on a tick still get a range
