// What a timeline says: records of a finished run (the JSON of AR Timeline) or of one that goes on (live events),
// ready to be drawn, read out and compared. No DOM, no ComfyUI.

import { brief, check } from "./timeline_check.js";

export const DECISIONS = ["recompute", "predict", "cache", "commit", "prefill"];
export const MEANING = {
  recompute: "the model ran",
  predict: "the velocity was extrapolated",
  cache: "the last velocity was reused",
  commit: "clean keys and values were written",
  prefill: "given frames were read into the K/V store",
  inactive: "shown to the model, not denoised",
};
const PREFIXES = [["E", 1e18], ["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]];

/** A number to three significant figures; a dash where there is none. */
export function figures(value) {
  if (!Number.isFinite(value)) return "-";
  return Math.abs(value) < 1000 ? String(Number(value.toPrecision(3))) : value.toFixed(0);
}

/** A number with its SI prefix, as in "1.23 PFLOP". */
export function quantity(value, unit) {
  const [prefix, size] = PREFIXES.find(([, size]) => value >= size) ?? ["", 1];
  return `${figures(value / size)} ${prefix}${unit}`;
}

/** One run: `records` in order of their column; `decision` is an index into DECISIONS, `rows` and `windowRows` are [first, last + 1]. */
export class Run {
  constructor(header = {}) {
    this.title = header.title ?? "";
    this.rows = header.rows ?? 0;
    this.columns = header.columns ?? 0;
    this.rowUnit = header.row_unit ?? "latent frame";
    this.framesPerRow = header.frames_per_row ?? 1;
    this.branches = header.branches ?? 1;
    this.remark = header.remark ?? null;
    this.settings = header.settings ?? {};
    this.totals = header.totals ?? null;
    this.run = header.run ?? null;
    this.done = false;
    this.stopped = null;
    this.records = [];
    this.counts = DECISIONS.map(() => 0);
    this.inactive = false;
    this.reached = 0;
    this.peak = 0;
    this.limit = 0;
    this.flops = 0;
    this.seconds = 0;
  }

  /** The run that the JSON of AR Timeline holds; throws where another version wrote it or it is damaged. */
  static fromJson(data) {
    if (data?.version !== 1) {
      throw new Error(`This timeline has version ${brief(data?.version)}; this release of AR Video Accelerator reads version 1.`);
    }
    check(data);
    const run = new Run(data);
    for (const record of data.records) {
      run.add({
        ...record,
        start: record.frames[0],
        end: record.frames[1],
        windowStart: record.window?.[0] ?? record.frames[0],
        windowEnd: record.window?.[1] ?? record.frames[1],
        decision: DECISIONS.indexOf(record.decision),
      });
    }
    run.done = true;
    return run;
  }

  /** Takes a live event in; the first one of a run makes the run (`Run.fromEvent`). */
  update(event) {
    this.rows = Math.max(this.rows, event.rows);
    this.columns = Math.max(this.columns, event.columns);
    this.branches = event.branches;
    for (const values of event.records) {
      const named = Object.fromEntries(event.keys.map((key, index) => [key, values[index] ?? null]));
      this.add({ ...named, windowStart: named.window_start, windowEnd: named.window_end });
    }
    if (event.done) {
      this.done = true;
      this.remark = event.remark;
    }
    return this;
  }

  static fromEvent(event) {
    return new Run(event).update(event);
  }

  add(record) {
    if (!DECISIONS[record.decision]) return;
    record.rows = [Math.floor(record.start / this.framesPerRow), Math.ceil(record.end / this.framesPerRow)];
    record.windowRows = [Math.floor(record.windowStart / this.framesPerRow), Math.ceil(record.windowEnd / this.framesPerRow)];
    this.records.push(record);
    this.counts[record.decision] += 1;
    this.inactive ||= record.rows[0] !== record.windowRows[0] || record.rows[1] !== record.windowRows[1];
    this.reached = Math.max(this.reached, record.column + 1);
    this.columns = Math.max(this.columns, this.reached);
    this.rows = Math.max(this.rows, record.rows[1], record.windowRows[1]);
    this.flops += record.flops ?? 0;
    this.seconds += record.seconds ?? 0;
    if (Number.isFinite(record.discrepancy)) this.peak = Math.max(this.peak, record.discrepancy);
    if (Number.isFinite(record.threshold)) this.limit = Math.max(this.limit, record.threshold);
  }

  /** Places [first, last) in `records` of those in columns [from, to). Records come sorted by column. */
  between(from, to) {
    return [this.place(from), this.place(to)];
  }

  place(column) {
    let low = 0;
    let high = this.records.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.records[middle].column < column) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** The records of one column that touch a row; all of the column where `row` is null. */
  at(column, row = null) {
    const found = this.records.slice(...this.between(column, column + 1));
    return found.filter(({ rows: [first, last] }) => row === null || (first <= row && row < last));
  }

  /** Model calls by decision, each CFG branch counted; prefill counts as commit, as in the report. */
  calls() {
    if (this.totals?.calls) {
      const { recompute, predict, cache, commit } = this.totals.calls;
      return { recompute, predict, cache, commit };
    }
    const [recompute, predict, cache, commit, prefill] = this.counts.map((count) => count * this.branches);
    return { recompute, predict, cache, commit: commit + prefill };
  }

  skippedShare() {
    const { recompute, predict, cache } = this.calls();
    const steps = recompute + predict + cache;
    return steps ? (predict + cache) / steps : 0;
  }

  /** Facts beside the calls, as [name, text]; what is not known is left out. */
  facts() {
    const totals = this.totals ?? { flops: this.flops, seconds: this.seconds };
    const facts = [];
    if (totals.flop_ratio) {
      facts.push(["FLOPs", `${quantity(totals.flops, "FLOP")} instead of ${quantity(totals.flops_full, "FLOP")}: ${totals.flop_ratio.toFixed(2)}x fewer`]);
    } else if (totals.flops) {
      facts.push(["FLOPs", quantity(totals.flops, "FLOP")]);
    }
    if (totals.seconds) {
      const full = this.skippedShare() ? totals.seconds_full_estimate : null;
      const faster = full ? `, about ${(full / totals.seconds).toFixed(2)}x faster than computing every call` : "";
      facts.push(["time", `${seconds(totals.seconds)}${faster}`]);
    }
    if (totals.state_bytes != null) facts.push(["state", quantity(totals.state_bytes, "B")]);
    if (totals.kv_bytes != null) facts.push(["K/V", quantity(totals.kv_bytes, "B")]);
    if (totals.kernels) facts.push(["kernels", [].concat(totals.kernels).join(", ")]);
    return facts;
  }

  /** Where the run stands, in a few words. */
  status() {
    if (this.stopped) return `${this.stopped} after ${this.reached} of ${this.columns} iterations`;
    if (!this.done) return `iteration ${this.reached} of ${this.columns}`;
    return `${this.reached} iterations, ${(100 * this.skippedShare()).toFixed(0)} % of calls skipped`;
  }

  /** What a reader is told about one record, as lines. */
  describe(record) {
    const decision = DECISIONS[record.decision];
    const order = record.order == null ? "" : `, order ${record.order}`;
    const lines = [
      `${decision}${order}${record.forced ? ` (${record.forced})` : ""}: ${MEANING[decision]}`,
      `segment ${record.segment}, iteration ${record.iteration}, latent frames ${record.start} to ${record.end - 1}`,
    ];
    if (record.sigma != null) lines.push(`sigma ${figures(record.sigma)}`);
    if (record.discrepancy != null || record.threshold != null) {
      lines.push(`discrepancy ${figures(record.discrepancy)}, threshold ${figures(record.threshold)}`);
    }
    if (record.corrected != null) lines.push(`residual correction ${figures(record.corrected)}`);
    if (record.queries?.length) {
      const spans = record.queries.map(([start, end]) => `${start} to ${end - 1}`);
      lines.push(`forwarded latent frames ${spans.join(", ")}`);
    }
    if (record.error != null) lines.push(`predicted against true: relative error ${figures(record.error)}`);
    if (record.seconds) lines.push(seconds(record.seconds));
    return lines;
  }
}

function seconds(value) {
  return value < 1 ? `${figures(1000 * value)} ms` : `${figures(value)} s`;
}

/** Rows of a table that sets two runs side by side: [what, first, second]. */
export function compareRuns(first, second) {
  const rows = [];
  const [one, two] = [first.calls(), second.calls()];
  for (const name of Object.keys(one)) {
    if (one[name] || two[name]) rows.push([name, String(one[name]), String(two[name])]);
  }
  rows.push(["skipped", ...[first, second].map((run) => `${(100 * run.skippedShare()).toFixed(0)} %`)]);
  const known = [new Map(first.facts()), new Map(second.facts())];
  for (const name of new Set([...known[0].keys(), ...known[1].keys()])) {
    rows.push([name, ...known.map((facts) => facts.get(name) ?? "-")]);
  }
  return rows;
}

/** A range of columns that a reader looks at; always inside [0, columns] and at least `least` wide. */
export class View {
  constructor(columns = 0, least = 8) {
    this.least = least;
    this.columns = columns;
    this.from = 0;
    this.to = columns;
  }

  get whole() {
    return this.from <= 0 && this.to >= this.columns;
  }

  /** A run grew or changed; a view of everything goes on to show everything. */
  resize(columns) {
    const whole = this.whole;
    this.columns = columns;
    if (whole) this.fit();
    else this.set(this.from, this.to);
  }

  fit() {
    this.from = 0;
    this.to = this.columns;
  }

  set(from, to) {
    const width = Math.min(Math.max(to - from, Math.min(this.least, this.columns)), this.columns);
    this.from = Math.min(Math.max(from, 0), this.columns - width);
    this.to = this.from + width;
  }

  /** Zooms by `factor` (> 1 is closer) around a column, which stays where it is. */
  zoom(factor, around) {
    const width = Math.min(Math.max((this.to - this.from) / factor, Math.min(this.least, this.columns)), this.columns);
    const share = (around - this.from) / (this.to - this.from || 1);
    this.set(around - share * width, around + (1 - share) * width);
  }

  pan(columns) {
    this.set(this.from + columns, this.to + columns);
  }

  /** Moves just far enough to show a column. */
  reveal(column) {
    if (column < this.from) this.pan(column - this.from);
    else if (column + 1 > this.to) this.pan(column + 1 - this.to);
  }
}
