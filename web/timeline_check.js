// What a timeline's JSON has to hold so that it can be shown; a file may be cut off, changed by hand or something else.

const MOST_ROWS = 1 << 16;
const MOST_COLUMNS = 1 << 22;
const REMEDY = "queue the workflow again, or use the JSON that AR Timeline saved.";
const CALLS = ["recompute", "predict", "cache", "commit"];
const PLACES = ["segment", "iteration", "column"];
const NUMBERS = ["sigma", "discrepancy", "threshold", "corrected", "error", "flops", "seconds"];

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isWhole = (value, least, most) => Number.isInteger(value) && least <= value && value <= most;
const isNumber = (value) => value == null || Number.isFinite(value);
const isText = (value) => value == null || typeof value === "string";

/** A value in a sentence. */
export function brief(value) {
  const text = JSON.stringify(value) ?? "undefined";
  return text.length > 40 ? `${text.slice(0, 40)}...` : text;
}

function refuse(what) {
  throw new Error(`This timeline of AR Video Accelerator is damaged: ${what}; ${REMEDY}`);
}

function isSpan(value, most) {
  if (!Array.isArray(value) || value.length !== 2) return false;
  return isWhole(value[0], 0, most) && isWhole(value[1], value[0], most);
}

/** Throws for a timeline's JSON, of a version that is known, with anything in it that cannot be shown. */
export function check(data) {
  const sizes = { rows: [0, MOST_ROWS], columns: [0, MOST_COLUMNS], frames_per_row: [1, MOST_ROWS], branches: [1, MOST_ROWS] };
  for (const [name, [least, most]] of Object.entries(sizes)) {
    if (name in data && !isWhole(data[name], least, most)) refuse(`${name} is ${brief(data[name])}`);
  }
  for (const name of ["title", "row_unit", "remark"]) {
    if (!isText(data[name])) refuse(`${name} is ${brief(data[name])}`);
  }
  if (!isObject(data.settings ?? {})) refuse(`settings is ${brief(data.settings)}`);
  checkTotals(data.totals ?? {});
  if (!Array.isArray(data.records)) refuse(`records is ${brief(data.records)}`);
  const frames = MOST_ROWS * (data.frames_per_row ?? 1);
  data.records.forEach((record, index) => checkRecord(record, index, frames));
  const late = data.records.findIndex(({ column }, index) => index && column < data.records[index - 1].column);
  if (late > 0) refuse(`record ${late} stands before the one it follows`);
}

function checkTotals(totals) {
  if (!isObject(totals)) refuse(`totals is ${brief(totals)}`);
  const { calls, kernels, ...sums } = totals;
  const wrong = Object.keys(sums).find((name) => !isNumber(sums[name]));
  if (wrong) refuse(`${brief(wrong)} in totals is ${brief(sums[wrong])}`);
  if (calls != null && !CALLS.every((name) => isWhole(calls[name], 0, Number.MAX_SAFE_INTEGER))) {
    refuse(`calls in totals is ${brief(calls)}`);
  }
  if (kernels != null && ![].concat(kernels).every((name) => typeof name === "string")) {
    refuse(`kernels in totals is ${brief(kernels)}`);
  }
}

function checkRecord(record, index, frames) {
  const wrong = (name) => refuse(`${name} of record ${index} is ${brief(record[name])}`);
  if (!isObject(record)) refuse(`record ${index} is ${brief(record)}`);
  for (const name of PLACES) if (!isWhole(record[name], 0, MOST_COLUMNS)) wrong(name);
  for (const name of NUMBERS) if (!isNumber(record[name])) wrong(name);
  if (!isText(record.forced)) wrong("forced");
  if (!isText(record.order) && !isNumber(record.order)) wrong("order");
  if (!isSpan(record.frames, frames)) wrong("frames");
  if (record.window != null && !isSpan(record.window, frames)) wrong("window");
  const queries = record.queries ?? [];
  if (!Array.isArray(queries) || !queries.every((span) => isSpan(span, frames))) wrong("queries");
}
