"""The quickstart's report: one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from pathlib import Path

from qwenvl_eval.scoring import Accuracy

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 240, 48, 30
PICTURES_SHOWN = 24
MISTAKES_SHOWN = 12
LEAST_LOSS = 1e-6


@dataclass(frozen=True)
class Row:
    """A line of the table; speeds are None where nothing was run."""

    name: str
    accuracy: Accuracy
    samples_per_second: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Curve:
    """The training's (step, loss) pairs and its speed."""

    steps: list[tuple[int, float]]
    conversations_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class Shown:
    """A test question with the answer given, the answer wanted and the verdict."""

    picture: Path
    question: str
    answer: str
    target: str
    right: bool


STYLE = """
:root { color-scheme: light dark; --line: #8886; --ink: #2563eb; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #7aa7ff; --good: #4ade80; --bad: #f87171; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
.bar { fill: var(--ink); opacity: .55; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; font-size: .85rem; line-height: 1.3; }
figure img { width: 100%; image-rendering: pixelated; border-radius: .4rem; display: block; }
.right { color: var(--good); } .wrong { color: var(--bad); }
"""


def write_report(path: Path, rows: Sequence[Row], curve: Curve, shown: Sequence[Shown]) -> None:
    """Write the page: the first pictures of ``shown`` stand for all; wrong answers get their own section."""
    mistakes = [each for each in shown if not each.right]
    score = rows[-1].accuracy
    body = [
        "<h1>A small Qwen3-VL, fine-tuned on easy&#8209;vqa</h1>",
        f"<p>{score.total:,} test questions about {score.clusters} pictures that training never saw, "
        "answered greedily, scored by exact match; 95 % intervals, clustered by picture. Without looking: "
        "the most frequent training answer to the same question text.</p>",
        _table(rows),
        _bars(rows),
        "<h2>Training</h2>",
        f"<p>{curve.steps[-1][0]:,} steps at {curve.conversations_per_second:.1f} conversations/s and "
        f"{curve.tokens_per_second:,.0f} tokens/s. Loss per answer token:</p>",
        _loss(curve),
        "<h2>Test pictures</h2>",
        f"<p>{min(PICTURES_SHOWN, len(shown))} questions drawn at random.</p>",
        _grid(shown[:PICTURES_SHOWN]),
        "<h2>Mistakes</h2>",
        f"<p>{len(mistakes):,} of {len(shown):,} answers are wrong; "
        f"{min(MISTAKES_SHOWN, len(mistakes))} of them drawn at random.</p>",
        _grid(mistakes[:MISTAKES_SHOWN]),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Quickstart: {100 * score.value:.1f} %</title><style>{STYLE}</style></head><body>"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page + "\n".join(body) + "</body></html>\n", encoding="utf-8")
    partial.replace(path)


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        score = row.accuracy
        cells = [
            f"{100 * score.value:.1f} %",
            f"{100 * score.low:.1f} to {100 * score.high:.1f} %",
            "" if row.samples_per_second is None else f"{row.samples_per_second:.1f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        ]
        lines.append(f"<tr><td>{escape(row.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th></th><th>accuracy</th><th>95 % interval</th><th>samples/s</th><th>tokens/s</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def _bars(rows: Sequence[Row]) -> str:
    """Accuracies as bars from 0 to 100 %, with their intervals."""
    left, step = 110, 30
    parts = []
    for number, row in enumerate(rows):
        top, score = number * step + 6, row.accuracy
        width = WIDTH - left - 60
        low, high = (left + width * value for value in (score.low, score.high))
        parts.append(
            f'<text x="0" y="{top + 14}">{escape(row.name)}</text>'
            f'<rect class="bar" x="{left}" y="{top}" width="{width * score.value:.1f}" height="18"/>'
            f'<path d="M{low:.1f} {top + 9}H{high:.1f}" stroke="currentColor" stroke-width="2"/>'
            f'<text x="{high + 8:.1f}" y="{top + 14}">{100 * score.value:.1f} %</text>'
        )
    return _svg("accuracy", len(rows) * step, parts)


def _loss(curve: Curve) -> str:
    """The loss over steps, on a logarithmic axis of whole powers of ten."""
    last = curve.steps[-1][0]
    points = [(step, log10(max(loss, LEAST_LOSS))) for step, loss in curve.steps]
    low = floor(min(power for _, power in points))
    high = max(ceil(max(power for _, power in points)), low + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 30) * step / last

    def y(power: float) -> float:
        return 8 + (HEIGHT - BOTTOM - 8) * (high - power) / (high - low)

    parts = []
    for power in range(low, high + 1):
        parts.append(f'<path d="M{LEFT} {y(power):.1f}H{x(last)}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(power) + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for step in sorted({round(last * part / 4) for part in range(5)}):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{step:,}</text>')
    line = " ".join(f"{x(step):.1f},{y(power):.1f}" for step, power in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="var(--ink)" stroke-width="2"/>')
    return _svg("loss curve", HEIGHT, parts)


def _svg(label: str, height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _grid(shown: Sequence[Shown]) -> str:
    return f'<div class="grid">{"".join(map(_figure, shown))}</div>'


def _figure(shown: Shown) -> str:
    data = base64.b64encode(shown.picture.read_bytes()).decode()
    answer = escape(shown.answer.strip()) or "(nothing)"
    if shown.right:
        verdict = f'<span class="right">✓ {answer}</span>'
    else:
        verdict = f'<span class="wrong">✗ {answer}</span> (right: {escape(shown.target)})'
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="test picture">'
        f"<figcaption>{escape(shown.question)}<br>{verdict}</figcaption></figure>"
    )
