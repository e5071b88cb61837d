"""``python -m bench``: every method against fewer steps at equal FLOPs, on the embedded models.

Writes ``quality.json`` (``{"rows": [...]}``, one row a model, method, budget and clip), ``quality.md`` (means with 95 %
bootstrap intervals over clips) and ``pareto-<model>.svg`` into ``bench/results``, and puts the presets' means into
``accel/presets.json``. What is finished is stored in ``bench/results/rows`` and found again, so a run that was stopped
goes on, and several may share the work; ``--pack`` puts it into ``rows.json.xz``, from where another machine takes it
up, and ``--stored`` makes the tables of what there is. Only the whole table goes into ``bench/results``: with
``--quick`` it goes into ``quick``, with ``--segments 4`` into ``segments-4``, with ``--models`` or ``--methods`` into
``selected``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from accel.presets import TABLE
from demo.generate import lasting

from .measure import QUICK, WHOLE, Bench, one_thread
from .methods import METHODS
from .presets import fill
from .report import write
from .scenes import PLANS
from .store import Store

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--clips", type=int, help=f"seeds, each with a prompt of its own ({WHOLE.clips})")
    parser.add_argument("--segments", type=int, help="another number of them than the plans have (6)")
    parser.add_argument("--quick", action="store_true", help="a short plan, to see that everything works")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--output", type=Path, help="where the tables go; stored rows are always shared")
    parser.add_argument("--stored", action="store_true", help="measure nothing; the tables of what is stored")
    parser.add_argument("--pack", action="store_true", help="measure nothing; pack what is stored")
    arguments = parser.parse_args()
    store, packed = Store(RESULTS / "rows"), RESULTS / "rows.json.xz"
    if arguments.pack:
        store.pack(packed)
        return
    if arguments.clips is not None and arguments.clips < 1:
        parser.error(f"--clips is {arguments.clips}; measure 1 clip or more")
    if arguments.segments is not None and arguments.segments < 1:
        parser.error(f"--segments is {arguments.segments}; give 1 or more")
    one_thread()
    extent = QUICK if arguments.quick else WHOLE
    extent = replace(extent, clips=arguments.clips or extent.clips)
    if arguments.segments is not None:
        extent = replace(extent, plans={kind: lasting(plan, arguments.segments) for kind, plan in extent.plans.items()})
    chosen = set(arguments.models) < set(PLANS) or set(arguments.methods) < set(METHODS)
    lasts = f"segments-{arguments.segments}" if arguments.segments else ""
    folder = arguments.output or RESULTS / ("quick" if arguments.quick else lasts or ("selected" if chosen else ""))
    store.unpack(packed)
    bench = Bench(extent, arguments.models, arguments.methods, store.folder, arguments.jobs, arguments.stored)
    if not arguments.stored:
        print(bench.estimate(), flush=True)
    rows, missing = bench.run(lambda line: print(line, flush=True))
    print(write(folder, rows, missing, extent))
    if folder == RESULTS:
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        whole = extent.clips == WHOLE.clips
        fill(table, rows, extent.plans, "make bench" if whole else f"python -m bench --clips {extent.clips}")
        TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
