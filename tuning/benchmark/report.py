"""The files that people read: table.md, and benchmark.html with charts, tests, monitors and choices."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import storage
from tuning.benchmark.charts import forest
from tuning.benchmark.results import SCORES
from tuning.report.charts import ACCENT, FAILED, GREY, INK, SECOND, STOPPED, Line, over_epochs
from tuning.report.environment import environment

TABLE_FILE, PAGE_FILE = "table.md", "benchmark.html"
TITLES = {"auroc": "macro AUROC", "ap": "mAP"}
MONITORS = {
    "mean_sum_p": "sum of probabilities an image",
    "selected_share": "share of entries selected",
    "pseudo_positives": "pseudo-positives an image",
    "pseudo_precision": "precision of pseudo-positives",
    "pseudo_recall": "hidden positives recovered",
}
DASH = "–"
Found = Mapping[str, Any]
"""The content of results.json."""


def write_table(found: Found, out: str) -> str:
    """Writes table.md into `out`; its text."""
    text = markdown(found)
    storage.write_bytes(storage.join(out, TABLE_FILE), text.encode())
    return text


def write_page(found: Found, out: str) -> str:
    """Writes benchmark.html into `out`; its place. One file, no network."""
    page = environment().get_template("benchmark.html.j2").render(**_content(found))
    place = storage.join(out, PAGE_FILE)
    storage.write_bytes(place, page.encode())
    return place


def ranked(found: Found) -> list[str]:
    """Methods with a score, the best mAP first."""
    scored = [name for name, row in found["methods"].items() if row["ap"]["mean"] is not None]
    return sorted(scored, key=lambda name: -found["methods"][name]["ap"]["mean"]["mean"])


def table_rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table, as texts."""
    protocol = found["protocol"]
    header = ["method", "n"]
    for name in SCORES:
        header += [TITLES[name], *(f"- {rival}" for rival in protocol["against"]), "gap closed"]
    return header, [_row(found, method) for method in ranked(found)]


def _row(found: Found, method: str) -> list[str]:
    row = found["methods"][method]
    texts = [method, str(row["auroc"]["mean"]["n"])]
    for name in SCORES:
        entry = row[name]
        differences = [entry["against"].get(rival) for rival in found["protocol"]["against"]]
        texts += [
            interval(entry["mean"]),
            *(DASH if d is None else interval(d["difference"], sign=True) for d in differences),
            share(entry["gap_share"]),
        ]
    return texts


def markdown(found: Found) -> str:
    """The main table and the tests of our methods against all rivals, in Markdown."""
    header, rows = table_rows(found)
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1)), *map(_line, rows)]
    for method, tests in found["tests"].items():
        columns = [f"{method} minus", *(t for name in SCORES for t in (TITLES[name], "p (Holm)"))]
        lines += ["", _line(columns), _line(["---"] + ["---:"] * (len(columns) - 1))]
        lines += [_line([rival, *cells]) for rival, cells in test_rows(tests)]
    return "\n".join(lines) + "\n"


def test_rows(tests: Found) -> list[tuple[str, list[str]]]:
    """Rival -> difference and corrected p of every score; the strongest rival first."""
    rivals = sorted(tests["ap"], key=lambda rival: tests["ap"][rival]["difference"]["mean"])
    return [
        (
            rival,
            [
                text
                for name in SCORES
                for text in (
                    interval(tests[name][rival]["difference"], sign=True),
                    p_value(tests[name][rival]["p_holm"]),
                )
            ],
        )
        for rival in rivals
    ]


def interval(estimate: Found | None, *, sign: bool = False) -> str:
    """`0.771 [0.765, 0.777]`, or the mean alone where one replicate gives no interval."""
    if estimate is None:
        return DASH
    style = "+.3f" if sign else ".3f"
    mean = format(estimate["mean"], style)
    if estimate["low"] is None:
        return mean
    return f"{mean} [{estimate['low']:{style}}, {estimate['high']:{style}}]"


def share(estimate: Found | None) -> str:
    """A share of the gap in per cent."""
    if estimate is None:
        return DASH
    mean = f"{100 * estimate['mean']:.0f} %"
    return mean if estimate["low"] is None else f"{mean} [{100 * estimate['low']:.0f}, {100 * estimate['high']:.0f}]"


def p_value(p: float | None) -> str:
    """Two digits, small ones as a bound."""
    return DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _content(found: Found) -> dict[str, Any]:
    header, rows = table_rows(found)
    protocol = found["protocol"]
    return {
        "found": found,
        "protocol": protocol,
        "header": header,
        "rows": rows,
        "ours": protocol["ours"],
        "forest": forest(found, ranked(found), TITLES),
        "tests": {method: test_rows(tests) for method, tests in found["tests"].items()},
        "titles": TITLES,
        "curves": _curves(found),
        "legend": _colours(found),
        "monitors": [(title, chart) for name, title in MONITORS.items() if (chart := _monitor(found, name, title))],
        "choices": [(name, choice, protocol["metric"]) for name, choice in found["choices"].items()],
        "text": {"interval": interval, "share": share},
    }


def _colours(found: Found) -> dict[str, str]:
    """The methods that are drawn over epochs: references, ours, and the strongest rivals, five at the most."""
    protocol, order = found["protocol"], ranked(found)
    rivals = [name for name in order if name not in {*protocol["oracles"], *protocol["ours"], *protocol["against"]}]
    wanted = [*protocol["ours"], protocol["upper"], *protocol["against"], *rivals[:1]]
    names = [name for name in dict.fromkeys(wanted) if name in order]
    return dict(zip(names, (ACCENT, INK, FAILED, STOPPED, SECOND, GREY), strict=False))


def _curves(found: Found) -> list[tuple[str, Any]]:
    metrics = {found["protocol"]["metric"]: "validation macro AUROC", "val_macro_ap": "validation mAP"}
    return [(title, _chart(found, name, title)) for name, title in metrics.items()]


def _chart(found: Found, name: str, title: str) -> Any:
    return over_epochs(_lines(found, name), f"{title} over epochs, mean of all runs")


def _monitor(found: Found, name: str, title: str) -> Any:
    lines = _lines(found, name)
    return over_epochs(lines, f"{title} over epochs, mean of all runs") if lines else None


def _lines(found: Found, name: str) -> list[Line]:
    lines = []
    for method, colour in _colours(found).items():
        values = found["curves"].get(method, {}).get(name)
        if values:
            known = [(epoch, value) for epoch, value in enumerate(values, 1) if value is not None]
            lines.append(
                Line([e for e, _ in known], [v for _, v in known], colour, method, method in found["protocol"]["ours"])
            )
    return lines
