// @vitest-environment happy-dom
import { beforeEach, describe, expect, it, vi } from "vitest";
import { TimelineWidget } from "../../web/timeline_widget.js";

/** A canvas that counts what is drawn; happy-dom draws nothing itself. */
function paintable() {
  const pen = new Proxy({ calls: 0 }, {
    get(target, name) {
      if (name === "createPattern") return () => ({ setTransform() {} });
      if (name === "createImageData") return (width, height) => ({ data: new Uint8ClampedArray(4 * width * height) });
      if (name === "calls") return target.calls;
      return typeof target[name] === "undefined" ? () => { target.calls += 1; } : target[name];
    },
    set(target, name, value) {
      target[name] = value;
      return true;
    },
  });
  HTMLCanvasElement.prototype.getContext = () => pen;
  globalThis.DOMMatrix ??= class {};
  for (const [name, value] of [["clientWidth", 600], ["clientHeight", 240]]) {
    Object.defineProperty(HTMLElement.prototype, name, { configurable: true, get: () => value });
  }
  return pen;
}

function json(count, more = {}) {
  return {
    version: 1, title: "A run", rows: 2, columns: count, row_unit: "chunk", frames_per_row: 4, branches: 1, remark: null, settings: {},
    records: Array.from({ length: count }, (_, column) => ({ segment: 0, iteration: column, column, frames: [0, 8], decision: column % 2 ? "predict" : "recompute", sigma: 0.5, discrepancy: 0.1, threshold: 0.2, flops: 1, seconds: 0.1 })),
    totals: { calls: { recompute: Math.ceil(count / 2), predict: count >> 1, cache: 0, commit: 0 }, flops: count, seconds: 1 },
    ...more,
  };
}

function event(run, columns, more = {}) {
  const keys = ["column", "segment", "iteration", "start", "end", "window_start", "window_end", "decision", "sigma"];
  return { version: 1, run, title: "Live", rows: 2, columns: 20, row_unit: "chunk", frames_per_row: 4, branches: 1, keys, records: columns.map((column) => [column, 0, column, 0, 8, 0, 8, 0, 0.5]), done: false, ...more };
}

const FILES = { json: { filename: "a.json" }, svg: { filename: "a.svg" } };
let pen;
let widget;

beforeEach(() => {
  pen = paintable();
  document.body.replaceChildren();
  widget = new TimelineWidget({ url: (file) => `/view?${file.filename}`, others: () => [] });
  document.body.append(widget.element);
});

const press = (key, more = {}) => widget.plot.element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, ...more }));
const text = (selector) => widget.element.querySelector(selector).textContent;

describe("the widget", () => {
  it("says that it waits until there is a run", () => {
    expect(text(".arva-remark")).toContain("queue the workflow");
    expect(widget.element.classList.contains("arva-empty")).toBe(true);
  });

  it("fills live, and a finished timeline takes the live one's place", () => {
    widget.live(event("a", [0, 1]));
    widget.live(event("a", [2]));
    expect(text(".arva-status")).toBe("iteration 3 of 20");
    widget.finished(json(20), "the report", FILES);
    expect(text(".arva-status")).toBe("20 iterations, 50 % of calls skipped");
    expect(widget.before).toBeNull();
    expect(widget.run.records).toHaveLength(20);
  });

  it("keeps the run before when a new one begins, and compares with it", () => {
    widget.finished(json(20), "", FILES);
    widget.live(event("b", [0]));
    widget.offer();
    expect([...widget.choice.options].map((option) => option.textContent)).toEqual(["compare with …", "the run before"]);
    widget.compare("before");
    expect(widget.second.element.hidden).toBe(false);
    expect(text("table")).toContain("skipped");
    expect(widget.table.rows[0].cells[2].textContent).toBe("the run before");
    widget.compare("");
    expect(widget.table.hidden).toBe(true);
  });

  it("stops where the run stopped, and a later run starts afresh", () => {
    widget.live(event("a", [0, 1]));
    widget.stop("stopped");
    expect(text(".arva-status")).toBe("stopped after 2 of 20 iterations");
    widget.live(event("b", [0]));
    expect(text(".arva-status")).toBe("iteration 1 of 20");
  });

  it("shows why nothing was skipped as a warning", () => {
    widget.finished(json(2, { remark: "Nothing was skipped: threshold 0.02 is below the smallest discrepancy 0.04; try 0.05." }), "", FILES);
    expect(text(".arva-remark")).toContain("try 0.05");
    expect(widget.remark.classList.contains("arva-warn")).toBe(true);
  });

  it("offers the saved files, and nothing before there are any", () => {
    expect(widget.links.every((link) => !link.href)).toBe(true);
    widget.finished(json(4), "the report", FILES);
    expect(widget.links.map((link) => link.getAttribute("href"))).toEqual(["/view?a.svg", "/view?a.json"]);
    expect(widget.copy.disabled).toBe(false);
  });

  it("copies the report", async () => {
    const writeText = vi.fn();
    Object.defineProperty(navigator, "clipboard", { configurable: true, value: { writeText } });
    widget.finished(json(4), "the report", FILES);
    await widget.copyReport();
    expect(writeText).toHaveBeenCalledWith("the report");
  });

  it("draws", () => {
    widget.finished(json(30), "", FILES);
    widget.redraw(true);
    expect(pen.calls).toBeGreaterThan(60);
  });

  it("leaves the page without a trace when it is removed", () => {
    widget.remove();
    expect(document.querySelector(".arva-timeline")).toBeNull();
  });
});

describe("the keyboard", () => {
  beforeEach(() => {
    widget.finished(json(100), "", FILES);
    widget.redraw(true);
  });

  it("walks through the iterations and says what was decided", () => {
    press("Home");
    press("ArrowRight");
    expect(widget.plot.at).toEqual({ column: 1, row: 0 });
    expect(widget.spoken.textContent).toContain("iteration 1, predict: the velocity was extrapolated");
    press("ArrowDown");
    expect(widget.plot.at.row).toBe(1);
    press("End");
    expect(widget.plot.at.column).toBe(99);
    press("ArrowRight");
    expect(widget.plot.at.column).toBe(99);
    press("Escape");
    expect(widget.tip.hidden).toBe(true);
  });

  it("zooms, keeps the cursor in sight and shows everything again", () => {
    press("End");
    press("+");
    press("+");
    expect(widget.view.to).toBe(100);
    expect(widget.view.whole).toBe(false);
    press("Home");
    expect(widget.view.from).toBe(0);
    press("0");
    expect(widget.view.whole).toBe(true);
  });

  it("leaves other keys and shortcuts to ComfyUI", () => {
    for (const given of [{ key: "q" }, { key: "0", ctrlKey: true }]) {
      const pressed = new KeyboardEvent("keydown", { bubbles: true, cancelable: true, ...given });
      widget.plot.element.dispatchEvent(pressed);
      expect(pressed.defaultPrevented).toBe(false);
    }
  });
});

it("every control has a name, and the plot can be reached", () => {
  widget.finished(json(4), "", FILES);
  for (const control of widget.element.querySelectorAll("button, a, select")) {
    expect(control.getAttribute("aria-label") ?? control.title, control.outerHTML).toBeTruthy();
  }
  expect(widget.plot.element.tabIndex).toBe(0);
  expect(widget.plot.element.getAttribute("aria-label")).toContain("arrow keys");
});
