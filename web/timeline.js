// Puts the timeline widget on AR Timeline nodes: live while a video is sampled, complete afterwards, back after a reload.
// The only file that knows ComfyUI's frontend.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { TimelineWidget } from "./timeline_widget.js";

const NODE = "ARVATimeline";
const TOASTS = "ARVA.Timeline.Toasts";
const REMEMBERED = 32;
const LEAST = [460, 420];

/** Widgets by the node that carries them; a removed node takes its widget along. */
const widgets = new Map();

/** Ids of workflows by the prompts that ran them, as far as live events told. */
const owners = new Map();

/** Outputs that the frontend has just handed to nodes, by their widgets. */
const handed = new Map();

/** Whether a run has ended that the server's history may not know yet. */
let ended = false;

function root() {
  return app.rootGraph ?? app.graph;
}

/** The node of an execution id, which is a path through subgraphs ("2:1"). */
function nodeAt(path) {
  let graph = root();
  let node = null;
  for (const id of String(path).split(":")) {
    node = graph?.getNodeById(Number(id)) ?? graph?.getNodeById(id);
    graph = node?.subgraph;
  }
  return node;
}

function fileUrl(file) {
  return api.apiURL(`/view?${new URLSearchParams(file)}`);
}

/** Fetches a finished timeline and shows it, unless a newer run has come in between. */
async function show(widget, files, report) {
  const asked = (widget.asked = files.json.filename);
  const response = await fetch(fileUrl(files.json), { cache: "no-store" });
  if (widget.asked !== asked) return;
  if (!response.ok) {
    widget.complain(`The file ${asked} of this timeline is gone from the output folder; queue the workflow again.`);
    return;
  }
  const data = await response.json();
  if (widget.asked !== asked) return;
  try {
    widget.finished(data, report, files);
  } catch (error) {
    widget.complain(error.message);
  }
}

function showOutput(widget, output) {
  const files = output?.arva_timeline?.[0];
  if (files?.json) show(widget, files, output.text?.[0] ?? "");
}

/** The other timelines of this graph, to compare with. */
function others(node) {
  const found = [];
  for (const [other, widget] of widgets) {
    if (other !== node && other.graph && widget.run) {
      found.push({ id: `${other.graph.id ?? ""}/${other.id}`, name: `${other.title} #${other.id}`, run: widget.run });
    }
  }
  return found;
}

function attach(node) {
  const widget = new TimelineWidget({ url: fileUrl, others: () => others(node) });
  widgets.set(node, widget);
  const dom = node.addDOMWidget("timeline_view", "ARVA_TIMELINE_VIEW", widget.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => 280,
    getValue: () => "",
    setValue: () => {},
  });
  dom.serialize = false;
  node.setSize([Math.max(node.size[0], LEAST[0]), Math.max(node.size[1], LEAST[1])]);
  const { onExecuted, onRemoved } = node;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    handed.set(widget, output);
    setTimeout(() => showHanded());
  };
  node.onRemoved = function () {
    onRemoved?.apply(this, arguments);
    widgets.delete(node);
    widget.remove();
  };
}

/** Whether an event belongs to the workflow that is open, as far as both know. */
function isOpen(workflow) {
  return !workflow || !root()?.id || workflow === root().id;
}

function onLive({ detail }) {
  owners.set(detail.prompt_id, detail.workflow);
  if (owners.size > REMEMBERED) owners.delete(owners.keys().next().value);
  if (!isOpen(detail.workflow)) return;
  for (const path of detail.views) {
    const widget = widgets.get(nodeAt(path));
    if (!widget) continue;
    widget.asked = null;
    widget.prompt = detail.prompt_id;
    widget.live(detail);
  }
  if (detail.done) toast(detail);
}

/** Tells of acceleration that did nothing, once a run. */
function toast({ accelerated, calls, remark }) {
  if (!accelerated || calls.predict + calls.cache > 0 || !remark) return;
  if (!app.extensionManager.setting.get(TOASTS)) return;
  app.extensionManager.toast.add({ severity: "warn", summary: "AR Video Accelerator", detail: remark, life: 10000 });
}

function onEnd(word) {
  return ({ detail }) => {
    for (const widget of widgets.values()) {
      if (widget.prompt === detail?.prompt_id) widget.stop(word);
    }
  };
}

/** Shows what the server's history knows of this workflow on nodes that show nothing yet. */
async function restore() {
  if (![...widgets.values()].some((widget) => !widget.run)) return;
  const response = await api.fetchApi(`/history?max_items=${REMEMBERED}`);
  if (!response.ok) return;
  const entries = Object.values(await response.json()).sort((one, two) => two.prompt[0] - one.prompt[0]);
  for (const { prompt, outputs } of entries) {
    const [, , graph, extra] = prompt;
    if (!root()?.id || extra?.extra_pnginfo?.workflow?.id !== root().id) continue;
    for (const [path, output] of Object.entries(outputs ?? {})) {
      const widget = graph[path]?.class_type === NODE ? widgets.get(nodeAt(path)) : null;
      if (widget && !widget.run && !widget.asked) showOutput(widget, output);
    }
  }
}

/** A workflow that was opened while its run was ending gets the run once the history has it. */
function onStatus() {
  if (!ended) return undefined;
  ended = false;
  return restore();
}

/**
 * Shows what was handed to nodes. The frontend finds nodes by their number alone, so the workflow that is open is handed
 * what another one's run made; that is left out, where live events told of the prompt.
 */
function showHanded(prompt = null) {
  const outputs = [...handed];
  handed.clear();
  if (!isOpen(owners.get(prompt))) return;
  for (const [widget, output] of outputs) showOutput(widget, output);
}

function copySelected() {
  for (const node of Object.values(app.canvas?.selected_nodes ?? {})) {
    const widget = widgets.get(node);
    if (widget?.report) return widget.copyReport();
  }
  return undefined;
}

app.registerExtension({
  name: "ARVA.Timeline",
  settings: [
    {
      id: TOASTS,
      name: "Tell when an acceleration skipped nothing",
      tooltip: "A message once per run, with the reason and what to change.",
      type: "boolean",
      defaultValue: true,
      category: ["AR Video", "Timeline", "Messages"],
    },
  ],
  commands: [{ id: "ARVA.CopyReport", label: "Copy the report of the selected AR Timeline", icon: "pi pi-copy", function: copySelected }],
  init() {
    const href = new URL("./timeline.css", import.meta.url).href;
    document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
  },
  setup() {
    api.addEventListener("arva.timeline", onLive);
    api.addEventListener("execution_interrupted", onEnd("stopped"));
    api.addEventListener("execution_error", onEnd("failed"));
    api.addEventListener("execution_success", () => (ended = true));
    api.addEventListener("status", onStatus);
    api.addEventListener("executed", ({ detail }) => showHanded(detail?.prompt_id));
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) attach(node);
  },
  afterConfigureGraph() {
    return restore();
  },
});
