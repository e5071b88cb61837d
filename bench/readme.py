"""``python -m bench.readme``: puts the tables of the README together from what ``python -m bench`` has written.

Beside every row stands the run with fewer steps that is nearest to it among those with at least as many FLOPs.
"""

from __future__ import annotations

import json
from pathlib import Path

from .methods import FEWER_STEPS
from .report import Rows
from .scenes import PLANS
from .table import Group, average, figure, groups, spread

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).with_name("results")
END = "<!-- end -->"
SHOWN = {
    "quality.json": (("high", None), ("auto", 2.5), ("scope", 3.0), ("balanced", None), ("fast", None)),
    "segments-4/quality.json": (
        ("high", None), ("tri-modal", 2.5), ("tri-modal", 3.0), ("balanced", None), ("tri-modal", 4.0), ("fast", None),
    ),
}  # fmt: skip
NAMES = {
    FEWER_STEPS: "fewer steps",
    "auto": "quality target",
    "scope": "Tri-Modal Scheduler with SCOPE's thresholds, scaled",
    "tri-modal": "Tri-Modal Scheduler, scaled",
}
HEAD = "| model | method | FLOPs | realised | PSNR dB (95 %) | SSIM | latent error |\n" + "|-" * 7 + "|"


def chosen(found: list[Group], shown: tuple[tuple[str, float | None], ...]) -> list[Group]:
    """The groups of one model that a table shows, the dearest first, with their rivals."""

    def ratio(group: Group) -> float:
        return round(average(group, "flop_ratio"), 2)

    rivals = [group for group in found if group[0]["method"] == FEWER_STEPS]
    own = [group for group in found if (group[0]["method"], group[0]["budget"]) in shown]
    for group in list(own):
        dearer = [rival for rival in rivals if ratio(rival) <= ratio(group)]
        if dearer and (nearest := max(dearer, key=ratio)) not in own:
            own.append(nearest)
    return sorted(own, key=lambda group: (ratio(group), group[0]["method"] != FEWER_STEPS))


def made(rows: Rows, name: str) -> str:
    """The table of one ``quality.json`` as Markdown."""
    lines = [HEAD]
    for kind in PLANS:
        first = kind
        for group in chosen(groups(rows, kind), SHOWN[name]):
            method = group[0]["method"]
            cells = (
                first,
                NAMES.get(method, f"*{method}*"),
                figure(group, "flop_ratio", "{:.2f}x"),
                figure(group, "realised", "{:.2f}"),
                spread(group, "psnr", 2),
                figure(group, "ssim", "{:.3f}"),
                figure(group, "latent_rel_l2", "{:.3f}"),
            )
            lines.append("| " + " | ".join(cells) + " |")
            first = ""
    return "\n".join(lines)


def renewed(text: str) -> str:
    """A README with its tables as the results have them."""
    for name in SHOWN:
        start = f"<!-- bench/results/{name} -->"
        before, mark, rest = text.partition(start)
        if not mark or END not in rest:
            raise ValueError(f"README.md has no {start} and {END} after it; put them where the table belongs.")
        rows = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
        text = f"{before}{start}\n\n{made(rows, name)}\n\n{END}{rest.partition(END)[2]}"
    return text


def main() -> None:
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
