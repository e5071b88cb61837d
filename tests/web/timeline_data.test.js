import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { DECISIONS, Run, View, compareRuns, figures, quantity } from "../../web/timeline_data.js";
import { Layout, tick } from "../../web/timeline_draw.js";

const KEYS = ["column", "segment", "iteration", "start", "end", "window_start", "window_end", "decision", "sigma", "discrepancy", "threshold", "seconds", "flops", "forced"];

/** The JSON of a run: a block of four latent frames a row, decisions by column. */
function json(decisions, more = {}) {
  return {
    version: 1, title: "A run", rows: 3, columns: decisions.length, row_unit: "chunk", frames_per_row: 4, branches: 2,
    settings: {}, remark: null,
    records: decisions.map((decision, column) => ({
      segment: column >> 3, iteration: column & 7, column, frames: [0, 8], window: [0, 12], decision, sigma: 0.5, discrepancy: column / 10, threshold: 0.2, flops: 10, seconds: 0.5, forced: null, order: null, corrected: null, error: null,
    })),
    totals: { calls: { recompute: 2, predict: 2, cache: 0, commit: 0 }, flops: 20, flops_full: 40, flop_ratio: 2, seconds: 1, seconds_full_estimate: 3, state_bytes: 4096, iterations: 2 },
    ...more,
  };
}

function event(rows, more = {}) {
  return { version: 1, run: "a", title: "Live", rows: 3, columns: 40, row_unit: "chunk", frames_per_row: 4, branches: 2, keys: KEYS, records: rows, behind: 0, done: false, ...more };
}

describe("a finished run", () => {
  const run = Run.fromJson(json(["recompute", "predict"]));

  it("knows its records, rows and calls", () => {
    expect(run.records).toHaveLength(2);
    expect(run.records[0].rows).toEqual([0, 2]);
    expect(run.records[0].windowRows).toEqual([0, 3]);
    expect(run.calls()).toEqual({ recompute: 2, predict: 2, cache: 0, commit: 0 });
    expect(run.skippedShare()).toBe(0.5);
    expect(run.status()).toBe("2 iterations, 50 % of calls skipped");
  });

  it("says FLOPs, time and state, and hides what is not known", () => {
    expect(run.facts()).toEqual([
      ["FLOPs", "20 FLOP instead of 40 FLOP: 2.00x fewer"],
      ["time", "1 s, about 3.00x faster than computing every call"],
      ["state", "4.1 kB"],
    ]);
    const totals = { calls: run.totals.calls, flops: 0, seconds: 0, kv_bytes: 2e9, kernels: ["relative_l1", "euler"] };
    expect(Run.fromJson(json(["cache"], { totals })).facts()).toEqual([["K/V", "2 GB"], ["kernels", "relative_l1, euler"]]);
  });

  it("knows whether frames were shown to the model without being denoised", () => {
    const narrow = json(["cache"]);
    narrow.records[0].window = [0, 8];
    expect([run.inactive, Run.fromJson(narrow).inactive]).toEqual([true, false]);
  });

  it("describes a record with everything that was measured", () => {
    const told = Run.fromJson(json(["predict"]));
    Object.assign(told.records[0], { order: 2, error: 0.0123, corrected: 0.9, forced: "cap", seconds: 0.004 });
    expect(told.describe(told.records[0])).toEqual([
      "predict, order 2 (cap): the velocity was extrapolated",
      "segment 0, iteration 0, latent frames 0 to 7",
      "sigma 0.5",
      "discrepancy 0, threshold 0.2",
      "residual correction 0.9",
      "predicted against true: relative error 0.0123",
      "4 ms",
    ]);
  });

  it("finds the records of a column and of a cell", () => {
    expect(run.at(1).map((record) => record.decision)).toEqual([DECISIONS.indexOf("predict")]);
    expect(run.at(1, 1)).toHaveLength(1);
    expect(run.at(1, 2)).toHaveLength(0);
    expect(run.at(5)).toHaveLength(0);
  });

  it("refuses another version and says which it reads", () => {
    expect(() => Run.fromJson({ version: 2, records: [] })).toThrow(/version 2.*reads version 1/);
  });
});

describe("a live run", () => {
  it("grows with its events and counts branches", () => {
    const run = Run.fromEvent(event([[0, 0, 0, 0, 8, 0, 12, 0, 1, null, null, 0.5, 100, "warm-up"], [1, 0, 1, 0, 8, 0, 12, 2, 0.9, 0.1, 0.2]]));
    expect(run.status()).toBe("iteration 2 of 40");
    expect(run.calls()).toEqual({ recompute: 2, predict: 0, cache: 2, commit: 0 });
    expect(run.records[0].forced).toBe("warm-up");
    expect(run.records[1].forced).toBeNull();
    expect(run.peak).toBe(0.1);
    run.update(event([[41, 1, 0, 8, 16, 4, 16, 1, 0.8]], { done: true, remark: "why" }));
    expect([run.done, run.remark, run.columns, run.rows]).toEqual([true, "why", 42, 4]);
  });

  it("passes over decisions it does not know", () => {
    expect(Run.fromEvent(event([[0, 0, 0, 0, 8, 0, 8, 9, 1]])).records).toHaveLength(0);
  });

  it("says where it stopped", () => {
    const run = Run.fromEvent(event([[0, 0, 0, 0, 8, 0, 8, 0, 1]]));
    run.stopped = "stopped";
    expect(run.status()).toBe("stopped after 1 of 40 iterations");
  });
});

it("two runs are set side by side, with a dash where one knows nothing", () => {
  const [one, two] = [Run.fromJson(json(["recompute", "predict"])), Run.fromJson(json(["recompute"], { totals: { calls: { recompute: 4, predict: 0, cache: 0, commit: 2 }, flops: 40 } }))];
  const rows = compareRuns(one, two);
  expect(rows.slice(0, 4)).toEqual([["recompute", "2", "4"], ["predict", "2", "0"], ["commit", "0", "2"], ["skipped", "50 %", "0 %"]]);
  expect(rows.find(([name]) => name === "time")).toEqual(["time", "1 s, about 3.00x faster than computing every call", "-"]);
});

describe("a view", () => {
  it("stays inside the run whatever is asked", () => {
    for (const columns of [0, 1, 5, 100, 10000]) {
      const view = new View(columns);
      for (let turn = 0; turn < 400; turn++) {
        const draw = Math.sin(turn * 12.9898 + columns) * 43758.5453;
        const chance = draw - Math.floor(draw);
        if (turn % 3 === 0) view.zoom(0.2 + 4 * chance, view.from + chance * (view.to - view.from));
        else if (turn % 3 === 1) view.pan((chance - 0.5) * 3 * columns);
        else view.reveal(Math.floor(chance * columns));
        expect(view.from).toBeGreaterThanOrEqual(0);
        expect(view.to).toBeLessThanOrEqual(columns + 1e-9);
        expect(view.to - view.from).toBeGreaterThanOrEqual(Math.min(8, columns) - 1e-6);
      }
    }
  });

  it("keeps the column under the pointer in its place when it zooms", () => {
    const view = new View(1000);
    view.zoom(4, 300);
    expect((300 - view.from) / (view.to - view.from)).toBeCloseTo(0.3, 9);
  });

  it("of everything goes on to show everything, a closer one stays where it is", () => {
    const view = new View(10);
    view.resize(50);
    expect([view.from, view.to]).toEqual([0, 50]);
    view.set(10, 20);
    view.resize(80);
    expect([view.from, view.to]).toEqual([10, 20]);
  });
});

describe("the layout", () => {
  const run = Run.fromJson(json(Array(100).fill("cache")));

  it("maps places to cells and back", () => {
    const layout = new Layout(run, new View(100), 700, 300);
    for (const column of [0, 17, 99]) expect(layout.column(layout.x(column) + layout.cell / 2)).toBe(column);
    for (const row of [0, 1, 2]) expect(layout.row(layout.y(row) + 1)).toBe(row);
    expect(layout.column(layout.left - 1)).toBeNull();
    expect(layout.row(layout.bottom + 1)).toBeNull();
  });

  it("shows only the rows at work when it is zoomed", () => {
    const long = Run.fromJson(json(Array(100).fill("cache"), { rows: 50 }));
    const view = new View(100);
    view.set(10, 30);
    const layout = new Layout(long, view, 700, 300);
    expect([layout.firstRow, layout.lastRow]).toEqual([0, 3]);
  });

  it("leaves no room for a strip where nothing was measured", () => {
    const silent = json(["recompute"]);
    silent.records[0].discrepancy = null;
    expect(new Layout(Run.fromJson(silent), new View(1), 700, 300).strip).toBe(0);
  });
});

it("numbers read as the report writes them", () => {
  expect([figures(0.12345), figures(1234.5), figures(null), figures(Infinity), figures(2)]).toEqual(["0.123", "1235", "-", "-", "2"]);
  expect([quantity(1.234e15, "FLOP"), quantity(999, "B"), quantity(5.04e11, "FLOP")]).toEqual(["1.23 PFLOP", "999 B", "504 GFLOP"]);
  expect([tick(245, 700, 44), tick(3, 300, 13), tick(10000, 700, 44)]).toEqual([20, 1, 1000]);
});

it("finds the records of a range as fast in a long run", () => {
  const run = new Run({ frames_per_row: 4 });
  for (let column = 0; column < 10000; column++) run.add({ column, start: 0, end: 4, windowStart: 0, windowEnd: 4, decision: 0 });
  expect(run.between(9990, 10000)).toEqual([9990, 10000]);
  expect(run.between(-3, 3)).toEqual([0, 3]);
});

it("what the pack ships is plain: no bundle, no minified line, no eval", () => {
  for (const name of ["timeline", "timeline_check", "timeline_data", "timeline_draw", "timeline_widget"]) {
    const text = readFileSync(new URL(`../../web/${name}.js`, import.meta.url), "utf8");
    expect(Math.max(...text.split("\n").map((line) => line.length)), name).toBeLessThan(180);
    expect(text).not.toMatch(/\beval\(|new Function|innerHTML/);
  }
});
