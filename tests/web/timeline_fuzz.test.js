// Whatever stands in a timeline's JSON, it is shown or refused in a sentence.

import { expect, it } from "vitest";
import { Run, View, compareRuns } from "../../web/timeline_data.js";

const CASES = Number(process.env.ARVA_FUZZ_CASES ?? 300);
const ODD = [null, true, -1, 0, 1.5, 1e308, -1e308, 2 ** 53, "nan", "", "x".repeat(5000), [], {}, [[]], [2, 1], [0, 1e9], [null, null], { a: {} }, "__proto__"];

/** Numbers in [0, 1) that are the same in every run (mulberry32). */
function chance(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function whole() {
  const record = (column, decision) => ({
    segment: 0, iteration: column, column, frames: [0, 8], window: [0, 12], decision, sigma: 0.5, sigmas: [0.5, 0.5], discrepancy: 0.1, increment: 0.1, threshold: 0.2, order: 1, corrected: null, queries: [[0, 4]], error: null, flops: 10, seconds: 0.5, forced: null,
  });
  const calls = { recompute: 2, predict: 2, cache: 0, commit: 0 };
  return {
    version: 1, title: "A run", rows: 3, columns: 3, row_unit: "chunk", frames_per_row: 4, branches: 2, schedule: {}, settings: { a: { b: 1 } }, remark: null, records: [record(0, "recompute"), record(1, "predict"), record(2, "cache")],
    totals: { calls, flops: 20, flops_full: 40, flop_ratio: 2, seconds: 1, seconds_full_estimate: 3, state_bytes: 4096, iterations: 2 },
  };
}

/** A timeline with one to three values replaced, removed or repeated. */
function altered(next) {
  let data = whole();
  for (let count = 1 + Math.floor(3 * next()); count; count--) {
    let [holder, key, inner] = [null, null, data];
    for (let depth = Math.floor(5 * next()) + 1; depth && inner !== null && typeof inner === "object"; depth--) {
      const keys = Object.keys(inner);
      if (!keys.length) break;
      [holder, key] = [inner, keys[Math.floor(keys.length * next())]];
      inner = holder[key];
    }
    const odd = structuredClone(ODD[Math.floor(ODD.length * next())]);
    const kind = next();
    if (holder === null) data = odd;
    else if (kind < 0.7) holder[key] = odd;
    else if (kind < 0.85 && Array.isArray(holder)) holder.splice(key, 1);
    else if (kind < 0.85) delete holder[key];
    else if (Array.isArray(holder)) holder.push(structuredClone(holder[key]));
    else holder[`more ${key}`] = odd;
  }
  return data;
}

/** Everything that the widget asks a run. */
function used(run) {
  const texts = [run.status(), ...run.facts().flat(), ...run.records.flatMap((record) => run.describe(record)), ...compareRuns(run, Run.fromJson(whole())).flat()];
  expect(texts.filter((text) => typeof text !== "string" || /undefined|NaN|\[object/.test(text))).toEqual([]);
  const view = new View(run.columns);
  view.zoom(2, run.reached);
  for (let column = 0; column < Math.min(run.columns, 5); column++) expect(run.at(column).length).toBeLessThanOrEqual(run.records.length);
  expect(run.rows).toBeLessThanOrEqual(1 << 17);
}

it(`${CASES} timelines of any content are shown or refused in a sentence`, () => {
  const next = chance(1);
  const outcomes = { shown: 0, refused: 0 };
  for (let index = 0; index < CASES; index++) {
    const data = altered(next);
    let run;
    try {
      run = Run.fromJson(data);
    } catch (error) {
      expect(error.message, JSON.stringify(data)).toMatch(/^This timeline .*AR Video Accelerator.*(reads|use)/);
      expect(error.message.length).toBeLessThan(400);
      outcomes.refused++;
      continue;
    }
    expect(() => used(run), JSON.stringify(data)).not.toThrow();
    outcomes.shown++;
  }
  expect(outcomes.shown).toBeGreaterThan(CASES / 20);
  expect(outcomes.refused).toBeGreaterThan(CASES / 4);
  console.log(`fuzz outcomes: ${outcomes.shown} shown, ${outcomes.refused} refused`);
}, 120_000);
