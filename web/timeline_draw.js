// Draws a run on a canvas: rows of latent frames or chunks over iterations, and the discrepancy against its threshold.
// Every call has a colour (after Okabe and Ito) and, where cells are large enough, a pattern. Cells narrower than a few
// pixels are gathered into bins, each filled by the shares of its decisions, so that any length takes the same time.

import { DECISIONS, figures } from "./timeline_data.js";

export const THEMES = {
  light: {
    page: "#ffffff", text: "#24292f", soft: "#57606a", frame: "#8c959f", limit: "#b42318",
    fills: ["#0072b2", "#e69f00", "#b3e0f8", "#009e73", "#cc79a7", "#e1e6ec"],
    marks: ["", "#ffffff", "#0b5c8a", "#ffffff", "#ffffff", "#a5afba"],
  },
  dark: {
    page: "#16191d", text: "#e6edf3", soft: "#a8b2bd", frame: "#6e7681", limit: "#ff8f7d",
    fills: ["#56b4e9", "#e69f00", "#14425c", "#009e73", "#cc79a7", "#2b323b"],
    marks: ["", "#16191d", "#a9dcf7", "#16191d", "#16191d", "#56616d"],
  },
};
const MARKS = [
  null,
  [[-1, 1, 1, -1], [0, 6, 6, 0], [5, 7, 7, 5]],
  [[1, 1.5, 2.6, 1.5], [4, 4.5, 5.6, 4.5]],
  [[0, 0, 6, 6], [0, 6, 6, 0]],
  [[0, 1.5, 6, 1.5], [0, 4.5, 6, 4.5]],
  [[2.4, 3, 3.6, 3]],
];
/** Place in `fills` and `marks` of latent frames that the model was shown and that were not denoised. */
export const INACTIVE = DECISIONS.length;
const LEFT = 46;
const RIGHT = 44;
const TOP = 16;
const AXIS = 16;
const STRIP = 44;
const GATHER = 2;
const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

/** Pattern tiles by canvas context and theme; a pattern belongs to no context, so one set per theme is enough. */
const tiles = new Map();

function fills(context, theme) {
  if (!tiles.has(theme)) {
    tiles.set(theme, MARKS.map((lines, decision) => {
      if (!lines) return theme.fills[decision];
      const tile = document.createElement("canvas");
      tile.width = tile.height = 12;
      const pen = tile.getContext("2d");
      pen.scale(2, 2);
      pen.fillStyle = theme.fills[decision];
      pen.fillRect(0, 0, 6, 6);
      pen.strokeStyle = theme.marks[decision];
      pen.lineWidth = 1.4;
      for (const [x0, y0, x1, y1] of lines) {
        pen.beginPath();
        pen.moveTo(x0, y0);
        pen.lineTo(x1, y1);
        pen.stroke();
      }
      const pattern = context.createPattern(tile, "repeat");
      pattern.setTransform(new DOMMatrix([0.5, 0, 0, 0.5, 0, 0]));
      return pattern;
    }));
  }
  return tiles.get(theme);
}

/** A sample of a decision's colour and pattern, for the legend. */
export function swatch(canvas, decision, theme) {
  const context = canvas.getContext("2d");
  context.fillStyle = fills(context, theme)[decision];
  context.fillRect(0, 0, canvas.width, canvas.height);
}

/** Where everything is, in CSS pixels: `x(column)`, `y(row)`, and back `column(x)`, `row(y)`. */
export class Layout {
  constructor(run, view, width, height) {
    this.strip = run.peak > 0 ? STRIP : 0;
    this.left = LEFT;
    this.right = Math.max(width - RIGHT, LEFT + 1);
    this.top = TOP;
    this.bottom = Math.max(height - AXIS - this.strip - (this.strip ? 6 : 0), TOP + 1);
    this.stripTop = this.bottom + AXIS;
    this.stripBottom = this.stripTop + this.strip;
    this.from = view.from;
    this.columns = Math.max(view.to - view.from, 1e-9);
    this.cell = (this.right - this.left) / this.columns;
    [this.firstRow, this.lastRow] = view.whole ? [0, run.rows] : visibleRows(run, view);
    this.lastRow = Math.max(this.lastRow, this.firstRow + 1);
    this.rowHeight = (this.bottom - this.top) / (this.lastRow - this.firstRow);
  }

  x(column) {
    return this.left + (column - this.from) * this.cell;
  }

  y(row) {
    return this.top + (row - this.firstRow) * this.rowHeight;
  }

  /** Column under a place, or null beside the plot. */
  column(x) {
    if (x < this.left || x >= this.right) return null;
    return Math.floor(this.from + (x - this.left) / this.cell);
  }

  row(y) {
    if (y < this.top || y >= this.bottom) return null;
    return Math.floor(this.firstRow + (y - this.top) / this.rowHeight);
  }
}

function visibleRows(run, view) {
  let first = Infinity;
  let last = 0;
  const [begin, end] = run.between(Math.floor(view.from), Math.ceil(view.to));
  for (let index = begin; index < end; index++) {
    const { rows, windowRows } = run.records[index];
    first = Math.min(first, rows[0], windowRows[0]);
    last = Math.max(last, rows[1], windowRows[1]);
  }
  return last > 0 ? [first, last] : [0, run.rows];
}

/** Draws `run` in `view` on `canvas`, sized in CSS pixels; returns the layout, for hit tests. */
export function draw(canvas, run, view, theme, width, height, scale = 1) {
  const [w, h] = [Math.max(Math.round(width * scale), 1), Math.max(Math.round(height * scale), 1)];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.fillStyle = theme.page;
  context.fillRect(0, 0, width, height);
  const layout = new Layout(run, view, width, height);
  context.font = FONT;
  context.save();
  context.beginPath();
  context.rect(layout.left, 0, layout.right - layout.left, height);
  context.clip();
  if (layout.cell >= GATHER) drawCells(context, run, view, layout, theme);
  else drawBins(context, run, view, layout, theme, scale);
  if (layout.strip) drawStrip(context, run, view, layout, theme);
  context.restore();
  drawAxes(context, run, view, layout, theme);
  return layout;
}

/** The rectangles of the records of one column, as [record, from, to] in rows; records of one cell share its height. */
function pieces(records) {
  if (records.length === 1) return [[records[0], ...records[0].rows]];
  const sharing = new Map();
  for (const record of records) {
    for (let row = record.rows[0]; row < record.rows[1]; row++) {
      if (sharing.has(row)) sharing.get(row).push(record);
      else sharing.set(row, [record]);
    }
  }
  const found = [];
  for (const [row, tenants] of sharing) {
    const last = found.at(-1);
    if (tenants.length === 1 && last?.[0] === tenants[0] && last[2] === row) last[2] = row + 1;
    else tenants.forEach((record, index) => found.push([record, row + index / tenants.length, row + (index + 1) / tenants.length]));
  }
  return found;
}

function drawCells(context, run, view, layout, theme) {
  const paint = layout.cell >= 4 && layout.rowHeight >= 5 ? fills(context, theme) : theme.fills;
  const gap = layout.cell >= 6 ? 0.7 : 0;
  const [begin, end] = run.between(Math.floor(view.from), Math.ceil(view.to));
  context.fillStyle = paint[INACTIVE];
  for (let index = begin; index < end; index++) {
    const { column, rows, windowRows } = run.records[index];
    if (windowRows[0] === rows[0] && windowRows[1] === rows[1]) continue;
    context.fillRect(layout.x(column), layout.y(windowRows[0]), layout.cell + 0.6, (windowRows[1] - windowRows[0]) * layout.rowHeight);
  }
  const rectangles = DECISIONS.map(() => []);
  for (let first = begin; first < end; ) {
    let next = first + 1;
    while (next < end && run.records[next].column === run.records[first].column) next++;
    for (const piece of pieces(run.records.slice(first, next))) rectangles[piece[0].decision].push(piece);
    first = next;
  }
  rectangles.forEach((found, decision) => {
    context.fillStyle = paint[decision];
    for (const [record, from, to] of found) {
      context.fillRect(layout.x(record.column), layout.y(from), layout.cell - gap, (to - from) * layout.rowHeight);
    }
  });
  if (layout.rowHeight < 5) return;
  context.fillStyle = theme.page;
  for (let row = layout.firstRow + 1; row < layout.lastRow; row++) {
    context.fillRect(layout.left, layout.y(row) - 0.4, layout.right - layout.left, 0.8);
  }
}

const packed = new Map();

/** A CSS colour as one pixel of image data. */
function pixel(colour) {
  if (!packed.has(colour)) {
    const value = Number.parseInt(colour.slice(1), 16);
    packed.set(colour, (0xff000000 | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) >>> 0);
  }
  return packed.get(colour);
}

let counts = new Uint16Array(0);

function drawBins(context, run, view, layout, theme, scale) {
  const wide = Math.round((layout.right - layout.left) * scale);
  const high = Math.round((layout.bottom - layout.top) * scale);
  const rows = layout.lastRow - layout.firstRow;
  const across = Math.max(Math.floor((layout.right - layout.left) / GATHER), 1);
  const down = Math.min(rows, Math.max(Math.floor(high / 4), 1));
  const kinds = DECISIONS.length + 1;
  if (counts.length < across * down * kinds) counts = new Uint16Array(across * down * kinds);
  counts.fill(0, 0, across * down * kinds);
  const perBin = (layout.columns / across) || 1;
  const share = down / rows;
  const mark = (bin, kind, span) => {
    const low = Math.max(Math.floor((span[0] - layout.firstRow) * share), 0);
    const top = Math.min(Math.ceil((span[1] - layout.firstRow) * share), down);
    for (let row = low; row < top; row++) counts[(bin * down + row) * kinds + kind] += 1;
  };
  const [begin, end] = run.between(Math.floor(view.from), Math.ceil(view.to));
  let [lastColumn, lastStart, lastEnd] = [-1, -1, -1];
  for (let index = begin; index < end; index++) {
    const { column, decision, rows: span, windowRows } = run.records[index];
    const bin = Math.floor((column - layout.from) / perBin);
    if (bin < 0 || bin >= across) continue;
    mark(bin, decision, span);
    const [start, stop] = windowRows;
    if ((start === span[0] && stop === span[1]) || (column === lastColumn && start === lastStart && stop === lastEnd)) continue;
    mark(bin, kinds - 1, windowRows);
    [lastColumn, lastStart, lastEnd] = [column, start, stop];
  }
  const image = context.createImageData(wide, high);
  const pixels = new Uint32Array(image.data.buffer);
  pixels.fill(pixel(theme.page));
  const colours = theme.fills.map(pixel);
  const edge = high / down >= 8 ? 1 : 0;
  for (let bin = 0; bin < across; bin++) {
    const x0 = Math.floor((bin * wide) / across);
    const x1 = Math.floor(((bin + 1) * wide) / across);
    for (let row = 0; row < down; row++) {
      const at = (bin * down + row) * kinds;
      let total = 0;
      for (let kind = 0; kind < kinds - 1; kind++) total += counts[at + kind];
      const y0 = Math.floor((row * high) / down);
      const y1 = Math.floor(((row + 1) * high) / down) - edge;
      if (!total) {
        if (counts[at + kinds - 1]) block(pixels, wide, x0, x1, y0, y1, colours[kinds - 1]);
        continue;
      }
      let done = 0;
      let from = y1;
      for (let kind = 0; kind < kinds - 1; kind++) {
        if (!counts[at + kind]) continue;
        done += counts[at + kind];
        const to = Math.round(y1 - ((y1 - y0) * done) / total);
        block(pixels, wide, x0, x1, to, from, colours[kind]);
        from = to;
      }
    }
  }
  context.putImageData(image, Math.round(layout.left * scale), Math.round(layout.top * scale));
}

function block(pixels, wide, x0, x1, y0, y1, colour) {
  for (let y = y0; y < y1; y++) pixels.fill(colour, y * wide + x0, y * wide + x1);
}

/** Value that fills the strip: thresholds stay readable below one great peak. */
function fullStrip(run) {
  const peak = run.limit > 0 ? Math.min(run.peak, 2.5 * run.limit) : run.peak;
  return Math.max(peak, 1.15 * run.limit) || 1;
}

let peaks = new Float32Array(0);
let limits = new Float32Array(0);
let kindsOfPeaks = new Uint8Array(0);

/** The greatest discrepancy of every iteration, or of every two pixels of them, as a bar; the threshold as a line. */
function drawStrip(context, run, view, layout, theme) {
  const full = fullStrip(run);
  const wide = Math.max(layout.cell, 2);
  const bins = Math.ceil((layout.right - layout.left) / wide) + 2;
  if (peaks.length < bins) {
    peaks = new Float32Array(bins);
    limits = new Float32Array(bins);
    kindsOfPeaks = new Uint8Array(bins);
  }
  peaks.fill(-1, 0, bins);
  limits.fill(-1, 0, bins);
  const [begin, end] = run.between(Math.floor(view.from), Math.ceil(view.to));
  const shift = 1e-6 / wide - (layout.from * layout.cell) / wide;
  for (let index = begin; index < end; index++) {
    const { column, discrepancy, threshold, decision } = run.records[index];
    if (!Number.isFinite(discrepancy)) continue;
    const bin = Math.floor((column * layout.cell) / wide + shift) + 1;
    if (bin < 0 || bin >= bins) continue;
    if (threshold != null && threshold > limits[bin]) limits[bin] = threshold;
    if (discrepancy > peaks[bin]) {
      peaks[bin] = discrepancy;
      kindsOfPeaks[bin] = decision;
    }
  }
  const height = (value) => Math.min(Math.max(value / full, 0), 1.08) * layout.strip;
  const bar = wide - (wide > 5 ? 0.7 : 0);
  for (let decision = 0; decision < DECISIONS.length; decision++) {
    context.fillStyle = theme.fills[decision];
    for (let bin = 0; bin < bins; bin++) {
      if (peaks[bin] < 0 || kindsOfPeaks[bin] !== decision) continue;
      const tall = height(peaks[bin]);
      context.fillRect(layout.left + (bin - 1) * wide, layout.stripBottom - tall, bar, tall);
    }
  }
  context.strokeStyle = theme.limit;
  context.beginPath();
  for (let bin = 0; bin < bins; bin++) {
    if (limits[bin] < 0) continue;
    const y = layout.stripBottom - height(limits[bin]);
    context.moveTo(layout.left + (bin - 1) * wide, y);
    context.lineTo(layout.left + bin * wide, y);
  }
  context.stroke();
}

/** The least of 1, 2, 5, 10, ... that leaves `room` pixels between labels. */
export function tick(count, length, room) {
  const least = (room * count) / Math.max(length, 1);
  const scale = 10 ** Math.max(Math.floor(Math.log10(Math.max(least, 1e-9))), 0);
  return [1, 2, 5, 10].map((step) => step * scale).find((step) => step >= least);
}

function drawAxes(context, run, view, layout, theme) {
  context.strokeStyle = theme.frame;
  context.lineWidth = 1;
  context.strokeRect(layout.left + 0.5, layout.top + 0.5, layout.right - layout.left - 1, layout.bottom - layout.top - 1);
  context.fillStyle = theme.soft;
  context.textBaseline = "middle";
  context.textAlign = "right";
  const unit = run.rowUnit === "latent frame" ? run.framesPerRow : 1;
  const rows = layout.lastRow - layout.firstRow;
  const rowStep = tick(rows, layout.bottom - layout.top, 13);
  for (let row = Math.ceil(layout.firstRow / rowStep) * rowStep; row < layout.lastRow; row += rowStep) {
    context.fillText(String(row * unit), layout.left - 5, layout.y(row + 0.5));
  }
  context.textAlign = "center";
  context.textBaseline = "top";
  const step = tick(layout.columns, layout.right - layout.left, 42);
  for (let column = Math.ceil(view.from / step) * step; column < view.to; column += step) {
    context.fillText(String(column), layout.x(column + 0.5), layout.bottom + 3);
  }
  drawSegments(context, run, view, layout, theme);
  if (layout.strip) {
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillStyle = theme.soft;
    context.fillText(figures(fullStrip(run)), layout.right + 4, layout.stripTop + 5);
    context.fillText("0", layout.right + 4, layout.stripBottom - 4);
    context.save();
    context.translate(10, (layout.stripTop + layout.stripBottom) / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("change", 0, 0);
    context.restore();
  }
  context.save();
  context.translate(10, (layout.top + layout.bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = theme.soft;
  if (layout.bottom - layout.top > 60) context.fillText(run.rowUnit, 0, 0);
  context.restore();
}

/** Where each segment begins, as {segment, from, to} in columns; kept per run, extended as it grows. */
function segments(run) {
  const known = (run.segments ??= { spans: [], read: 0 });
  for (; known.read < run.records.length; known.read++) {
    const { segment, column } = run.records[known.read];
    const last = known.spans.at(-1);
    if (last?.segment === segment) last.to = Math.max(last.to, column + 1);
    else known.spans.push({ segment, from: column, to: column + 1 });
  }
  return known.spans;
}

function drawSegments(context, run, view, layout, theme) {
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  context.fillStyle = theme.soft;
  context.strokeStyle = theme.text;
  context.lineWidth = 1;
  let lastLabel = -Infinity;
  context.beginPath();
  for (const span of segments(run)) {
    if (span.to <= view.from || span.from >= view.to) continue;
    const from = Math.max(layout.x(span.from), layout.left);
    const middle = (from + Math.min(layout.x(span.to), layout.right)) / 2;
    if (span.from > view.from && (span.to - span.from) * layout.cell >= 16) {
      context.moveTo(Math.round(from) + 0.5, 2);
      context.lineTo(Math.round(from) + 0.5, layout.strip ? layout.stripBottom : layout.bottom);
    }
    if (middle - lastLabel >= 26) {
      const first = lastLabel === -Infinity;
      const at = first ? Math.max(middle, layout.left + 28) : middle;
      context.fillText(first ? `segment ${span.segment}` : String(span.segment), at, 11);
      lastLabel = middle + (first ? 20 : 0);
    }
  }
  context.stroke();
}
