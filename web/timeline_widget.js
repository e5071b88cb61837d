// The timeline on a node: totals, the plot with zoom, pan, hover and keyboard, export, and a second run to compare with.
// Knows the DOM and nothing of ComfyUI; `timeline.js` puts it on nodes.

import { DECISIONS, MEANING, Run, View, compareRuns } from "./timeline_data.js";
import { INACTIVE, THEMES, draw, swatch } from "./timeline_draw.js";

const WAITING = "No run yet: queue the workflow, and this fills while the video is sampled.";
const HELP = "Drag or arrow keys move, + and - zoom, 0 shows everything. Click once to zoom with the wheel.";

/** An element with attributes, and children or text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function button(text, label, act) {
  const element = make("button", { type: "button", title: label, "aria-label": label }, text);
  element.addEventListener("click", act);
  return element;
}

/** One plot of a run: canvas, cursor and the text beside the pointer. */
class Plot {
  constructor(owner, label) {
    this.owner = owner;
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.cursor = make("div", { class: "arva-cursor", hidden: "" });
    this.element = make(
      "div",
      { class: "arva-plot", tabindex: "0", role: "application", "aria-roledescription": "timeline", "aria-label": `${label}. ${HELP}` },
      this.canvas,
      this.cursor,
    );
    this.run = null;
    this.layout = null;
    this.listen();
  }

  draw() {
    const { width, height } = { width: this.element.clientWidth, height: this.element.clientHeight };
    if (!this.run || width < 20 || height < 20) return;
    const scale = window.devicePixelRatio || 1;
    this.layout = draw(this.canvas, this.run, this.owner.view, this.owner.theme(), width, height, scale);
    this.place();
  }

  /** Pointer position in CSS pixels of the element, whatever the graph's zoom. */
  local(event) {
    const box = this.element.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * this.element.clientWidth) / (box.width || 1),
      ((event.clientY - box.top) * this.element.clientHeight) / (box.height || 1),
    ];
  }

  listen() {
    let drag = null;
    const { element, owner } = this;
    element.addEventListener("pointerdown", (event) => {
      if (!this.layout || event.button !== 0) return;
      event.stopPropagation();
      element.focus({ preventScroll: true });
      drag = { x: this.local(event)[0], from: owner.view.from };
      element.setPointerCapture(event.pointerId);
    });
    element.addEventListener("pointermove", (event) => {
      if (!this.layout) return;
      const [x, y] = this.local(event);
      if (drag) {
        event.stopPropagation();
        const width = owner.view.to - owner.view.from;
        const from = drag.from - (x - drag.x) / this.layout.cell;
        owner.view.set(from, from + width);
        owner.redraw();
      }
      this.point(this.layout.column(x), this.layout.row(y), [x, y]);
    });
    const release = () => {
      drag = null;
    };
    element.addEventListener("pointerup", release);
    element.addEventListener("pointercancel", release);
    element.addEventListener("pointerleave", () => {
      if (document.activeElement !== element) this.point(null);
    });
    element.addEventListener("blur", () => this.point(null));
    element.addEventListener("dblclick", (event) => {
      event.stopPropagation();
      owner.fit();
    });
    element.addEventListener(
      "wheel",
      (event) => {
        if (!this.layout || document.activeElement !== element) return;
        event.preventDefault();
        event.stopPropagation();
        const [x] = this.local(event);
        owner.zoom(Math.exp(-event.deltaY * 0.002), this.layout.column(x) ?? undefined);
      },
      { passive: false },
    );
    element.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const { run, layout, owner } = this;
    if (!run || !layout || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.at ?? { column: Math.floor(owner.view.from), row: null };
    const big = event.shiftKey ? 10 : 1;
    const act = {
      ArrowLeft: () => this.move(at.column - big, at.row),
      ArrowRight: () => this.move(at.column + big, at.row),
      ArrowUp: () => this.move(at.column, (at.row ?? layout.lastRow) - 1),
      ArrowDown: () => this.move(at.column, (at.row ?? layout.firstRow - 1) + 1),
      Home: () => this.move(0, null),
      End: () => this.move(run.reached - 1, null),
      "+": () => this.closer(1.6, at.column),
      "=": () => this.closer(1.6, at.column),
      "-": () => this.closer(1 / 1.6, at.column),
      0: () => owner.fit(),
      Escape: () => this.point(null),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }

  closer(factor, column) {
    this.owner.zoom(factor, column + 0.5);
    this.owner.view.reveal(column);
  }

  move(column, row) {
    const { run, owner } = this;
    const to = Math.min(Math.max(column, 0), Math.max(run.reached - 1, 0));
    owner.view.reveal(to);
    owner.redraw(true);
    const records = run.at(to);
    const [first, last] = records.length ? records[0].rows : [0, 1];
    const inside = row === null || !run.at(to, row).length ? Math.min(Math.max(row ?? first, first), last - 1) : row;
    this.point(to, inside, [this.layout.x(to), this.layout.y(inside)], true);
  }

  /** Shows what was decided at a cell; says it aloud where the keyboard asked. */
  point(column, row = null, place = null, aloud = false) {
    const { run, owner } = this;
    const records = run && column !== null && column < run.columns ? run.at(column, row) : [];
    const found = records.length || row !== null ? records : run && column !== null ? run.at(column) : [];
    this.at = column === null ? null : { column, row };
    if (!found.length) {
      this.at = null;
      this.cursor.hidden = true;
      owner.hint(null);
      return;
    }
    this.place();
    const lines = [`iteration ${column}`, ...found.slice(0, 3).flatMap((record) => run.describe(record))];
    if (found.length > 3) lines.push(`and ${found.length - 3} more`);
    owner.hint(lines, this, place, aloud);
  }

  place() {
    const { layout, cursor } = this;
    if (!this.at || !layout) return;
    cursor.hidden = false;
    const width = Math.max(layout.cell, 2);
    const [top, height] = this.at.row === null ? [layout.top, layout.bottom - layout.top] : [layout.y(this.at.row), layout.rowHeight];
    cursor.style.cssText = `left:${layout.x(this.at.column)}px;top:${top}px;width:${width}px;height:${Math.max(height, 2)}px`;
  }
}

/** The whole widget. `hooks`: `url(file)` of a saved file, `others()` -> [{id, name, run}], `changed()` after a run ended. */
export class TimelineWidget {
  constructor(hooks = {}) {
    this.hooks = hooks;
    this.run = null;
    this.before = null;
    this.report = "";
    this.files = null;
    this.view = new View();
    this.build();
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(this.plot.element);
    this.observer.observe(this.second.element);
    this.palette = new MutationObserver(() => {
      const dark = this.element.classList.contains("arva-dark");
      if ((this.theme() === THEMES.dark) !== dark) this.refresh();
    });
    for (const element of [document.documentElement, document.body]) {
      this.palette.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
    }
    this.refresh();
  }

  build() {
    this.title = make("span", { class: "arva-title" });
    this.state = make("span", { class: "arva-status", role: "status", "aria-live": "polite" });
    this.calls = make("div", { class: "arva-calls", role: "list", "aria-label": "Model calls by decision" });
    this.facts = make("div", { class: "arva-facts" });
    this.remark = make("div", { class: "arva-remark", role: "note" });
    this.plot = new Plot(this, "Timeline of the run: iterations from left to right, chunks or latent frames from top to bottom");
    this.second = new Plot(this, "Timeline of the run to compare with");
    this.second.element.hidden = true;
    this.thumb = make("div", { class: "arva-thumb" });
    this.range = make("div", { class: "arva-range", "aria-hidden": "true" }, this.thumb);
    this.tip = make("div", { class: "arva-tip", hidden: "" });
    this.spoken = make("div", { class: "arva-spoken", "aria-live": "assertive" });
    this.table = make("table", { class: "arva-table", hidden: "" });
    this.choice = make("select", { "aria-label": "Compare with another run", title: "Compare with another run" });
    this.choice.addEventListener("pointerdown", () => this.offer());
    this.choice.addEventListener("focus", () => this.offer());
    this.choice.addEventListener("change", () => this.compare(this.choice.value));
    this.copy = button("Copy report", "Copy the report as text", () => this.copyReport());
    this.links = ["svg", "json"].map((kind) =>
      make("a", { download: "", title: `Save the timeline as ${kind.toUpperCase()}`, role: "button" }, kind.toUpperCase()),
    );
    this.tools = make(
      "div",
      { class: "arva-tools", role: "toolbar", "aria-label": "Timeline tools" },
      button("−", "Zoom out", () => this.zoom(1 / 1.6)),
      button("fit", "Show the whole run", () => this.fit()),
      button("+", "Zoom in", () => this.zoom(1.6)),
      this.copy,
      ...this.links,
      this.choice,
    );
    this.element = make(
      "div",
      { class: "arva-timeline", role: "group", "aria-label": "AR video timeline" },
      make("div", { class: "arva-head" }, this.title, this.state),
      this.calls,
      this.facts,
      this.remark,
      this.plot.element,
      this.second.element,
      this.range,
      this.table,
      this.tools,
      this.tip,
      this.spoken,
    );
    for (const type of ["pointerdown", "dblclick", "contextmenu"]) {
      this.tools.addEventListener(type, (event) => event.stopPropagation());
    }
    this.offer();
  }

  theme() {
    if (this.element.isConnected) {
      const [r, g, b] = (getComputedStyle(this.element).backgroundColor.match(/[\d.]+/g) ?? [30, 30, 30]).map(Number);
      this.element.classList.toggle("arva-dark", 0.3 * r + 0.59 * g + 0.11 * b < 140);
    }
    return this.element.classList.contains("arva-dark") ? THEMES.dark : THEMES.light;
  }

  /** A live event; the first of a run begins a new picture. */
  live(event) {
    if (this.run?.run === event.run) {
      if (!this.run.done) this.run.update(event);
    } else this.begin(Run.fromEvent(event));
    this.refresh();
  }

  begin(run) {
    if (this.run?.done) this.before = this.run;
    this.run = run;
    this.report = "";
    this.files = null;
    this.view = new View(run.columns);
  }

  /** The finished timeline: its JSON, the report and the saved files. */
  finished(data, report = "", files = null) {
    const run = Run.fromJson(data);
    const [view, live] = [this.view, this.run && !this.run.files ? this.run : null];
    if (live && live.records.length) this.run = run;
    else this.begin(run);
    this.view = view.columns && live ? view : new View(run.columns);
    this.run.files = true;
    this.report = report;
    this.files = files;
    this.refresh();
  }

  /** The run ended without a result. */
  stop(word) {
    if (!this.run || this.run.done) return;
    this.run.stopped = word;
    this.refresh();
  }

  /** What could not be shown, and what to do. */
  complain(text) {
    this.problem = text;
    this.refresh();
    this.problem = null;
  }

  refresh() {
    const { run } = this;
    this.element.classList.toggle("arva-empty", !run);
    this.title.textContent = run?.title ?? "";
    this.state.textContent = run ? run.status() : "";
    this.remark.textContent = this.problem ?? run?.remark ?? (run ? "" : WAITING);
    this.remark.classList.toggle("arva-warn", Boolean(this.problem ?? run?.remark));
    this.facts.textContent = (run?.facts() ?? []).map(([name, text]) => `${name} ${text}`).join(" · ");
    this.legend();
    this.copy.disabled = !this.report;
    this.links.forEach((link, index) => {
      const file = this.files?.[["svg", "json"][index]];
      link.toggleAttribute("aria-disabled", !file);
      if (file) link.href = this.hooks.url?.(file) ?? "";
      else link.removeAttribute("href");
    });
    this.plot.run = run;
    if (run) this.view.resize(Math.max(run.columns, this.second.run?.columns ?? 0));
    if (this.second.run) this.tabulate();
    this.redraw();
  }

  legend() {
    const counts = this.run?.calls() ?? {};
    const names = DECISIONS.filter((name) => counts[name] || (this.run && ["recompute", "predict", "cache"].includes(name)));
    const theme = this.theme();
    const entry = (name, place, text) => {
      const sample = make("canvas", { width: "14", height: "12", "aria-hidden": "true" });
      swatch(sample, place, theme);
      return make("span", { role: "listitem", title: `${name}: ${MEANING[name]}` }, sample, text);
    };
    this.calls.replaceChildren(
      ...names.map((name) => entry(name, DECISIONS.indexOf(name), `${name} ${counts[name]}`)),
      ...(this.run?.inactive ? [entry("inactive", INACTIVE, "inactive")] : []),
    );
  }

  /** Draws in the next frame, or now; many calls make one drawing. */
  redraw(now = false) {
    const paint = () => {
      this.frame = null;
      this.plot.draw();
      if (this.second.run) this.second.draw();
      const { from, to, columns, whole } = this.view;
      this.range.hidden = whole;
      this.thumb.style.left = `${(100 * from) / (columns || 1)}%`;
      this.thumb.style.width = `${(100 * (to - from)) / (columns || 1)}%`;
    };
    if (now) paint();
    else this.frame ??= requestAnimationFrame(paint);
  }

  zoom(factor, around = (this.view.from + this.view.to) / 2) {
    this.view.zoom(factor, around);
    this.redraw();
  }

  fit() {
    this.view.fit();
    this.redraw();
  }

  hint(lines, plot = null, place = null, aloud = false) {
    this.tip.hidden = !lines;
    this.spoken.textContent = aloud && lines ? lines.join(", ") : "";
    if (!lines) return;
    this.tip.textContent = lines.join("\n");
    const [x, y] = place;
    const room = this.element.clientWidth - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(Math.min(plot.element.offsetLeft + x + 12, room), 2)}px`;
    const below = plot.element.offsetTop + y + 14;
    const above = plot.element.offsetTop + y - this.tip.offsetHeight - 8;
    this.tip.style.top = `${below + this.tip.offsetHeight > this.element.clientHeight && above > 0 ? above : below}px`;
  }

  /** Fills the choice of runs to compare with. */
  offer() {
    const chosen = this.choice.value;
    const runs = this.candidates();
    this.choice.replaceChildren(
      make("option", { value: "" }, "compare with …"),
      ...runs.map(({ id, name }) => make("option", { value: id }, name)),
    );
    this.choice.value = runs.some(({ id }) => id === chosen) ? chosen : "";
    this.choice.disabled = !runs.length && !this.second.run;
  }

  candidates() {
    const before = this.before ? [{ id: "before", name: "the run before", run: this.before }] : [];
    return [...before, ...(this.hooks.others?.() ?? [])];
  }

  compare(id) {
    const other = this.candidates().find((one) => one.id === id);
    this.second.run = other?.run ?? null;
    this.second.name = other?.name;
    this.second.element.hidden = this.table.hidden = !other;
    this.element.classList.toggle("arva-comparing", Boolean(other));
    this.refresh();
  }

  tabulate() {
    const cell = (tag, text) => make(tag, tag === "th" ? { scope: "col" } : {}, text);
    const row = (tag, texts) => make("tr", {}, ...texts.map((text) => cell(tag, text)));
    const body = compareRuns(this.run ?? new Run(), this.second.run).map((texts) => row("td", texts));
    this.table.replaceChildren(row("th", ["", "this run", this.second.name]), ...body);
  }

  async copyReport() {
    await navigator.clipboard.writeText(this.report);
    this.copy.textContent = "Copied";
    setTimeout(() => {
      this.copy.textContent = "Copy report";
    }, 1500);
  }

  remove() {
    this.observer.disconnect();
    this.palette.disconnect();
    if (this.frame) cancelAnimationFrame(this.frame);
    this.element.remove();
  }
}
