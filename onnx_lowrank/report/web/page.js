"use strict";
// The page: its state, and what is drawn anew when the state changes.

const view = {
  x: null,
  y: null,
  amount: null,
  column: "#",
  falls: false,
  filter: "",
  kind: "all",
  again: showPoint,
};
const byNode = new Map();
data.layers.forEach((layer, index) => layer.nodes.forEach((name) => byNode.set(name, index)));
let point = firstPoint();
let layer = firstLayer();
let list = null;

/** The smallest model without warnings and with a small error; without one, the model with the least error. */
function firstPoint() {
  const made = data.points.filter((each) => !each.note && each.detail);
  const cost = (each) => (isKnown(each.reached) ? each.reached : 1);
  const sound = made
    .filter((each) => !each.detail.warnings.length && isKnown(each.error) && each.error <= data.worthless)
    .sort((a, b) => cost(a) - cost(b));
  const exactest = [...made].sort(
    (a, b) => (isKnown(a.error) ? a.error : 9) - (isKnown(b.error) ? b.error : 9),
  );
  return sound[0] || exactest[0] || data.points[0];
}

/** The rewritten layer that saves most. */
function firstLayer() {
  const saved = (index) => data.layers[index].params - point.detail.rows[index].params;
  let best = 0;
  if (point.detail) data.layers.forEach((_, index) => (best = saved(index) > saved(best) ? index : best));
  return best;
}

function choosePoint(name) {
  point = data.points.find((each) => each.name === name);
  const wasInside = document.activeElement && document.activeElement.closest("#curve");
  showPoint();
  const button = document.querySelector('#curve button[aria-pressed="true"]');
  if (wasInside && button) button.focus({ preventScroll: true });
}

function chooseLayer(index, isAsked = true) {
  layer = index;
  list.mark(index);
  showLayer();
  showBudget();
  if (isAsked && matchMedia("(max-width: 60rem)").matches)
    document.getElementById("layer").scrollIntoView({ block: "start" });
}

function replace(id, part) {
  const old = document.getElementById(id);
  if (part) {
    old.replaceWith(part.node);
    part.draw();
  } else old.replaceChildren();
}

function showLayer() {
  replace("layer", layerCard(point, layer, chooseLayer));
}

function showBudget() {
  const select = document.querySelector("#budget select");
  const hadFocus = document.activeElement === select;
  replace("budget", budget(view, point.detail, layer, chooseLayer, showBudget));
  if (hadFocus) document.querySelector("#budget select").focus();
}

function chooseNode(name) {
  const index = byNode.get(name);
  return index === undefined ? null : () => chooseLayer(index);
}

function header() {
  const rewritten = point.detail ? point.detail.rows.filter((row) => row.option).length : null;
  const then = point.detail && point.detail.then ? `, then quantized (${point.detail.then})` : "";
  const line =
    data.kind === "sweep"
      ? `${data.points.filter((each) => !each.note).length} compressed models${then}`
      : `${rewritten} of ${data.layers.length} layers rewritten with recipe ${point.recipe}${then}`;
  const theme = h("button.quiet", { type: "button", id: "theme", "aria-live": "polite" });
  const name = () => (theme.textContent = isDark() ? "Light" : "Dark");
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    name();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
  return h(
    "header",
    null,
    h("div", null, h("h1", null, h("bdi", null, data.model)), h("p", null, line)),
    h(
      ".controls.noprint",
      null,
      theme,
      h("button.quiet", { type: "button", onclick: () => print() }, "Print"),
    ),
  );
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function reproduce() {
  const parts = [];
  if (data.command)
    parts.push(
      h("p.hint", null, data.kind === "sweep" ? "The whole sweep:" : "This command made the model:"),
      command(data.command),
    );
  if (!parts.length) parts.push(h("p", null, "The model was made from Python: the plan makes it again."));
  const facts = [
    ["input model", data.model],
    ["SHA-256", data.sha256],
    ["onnx-lowrank", data.version],
  ];
  parts.push(
    h(
      "dl.facts",
      null,
      facts.map(([title, value]) => [h("dt", null, title), h("dd", null, h("bdi", null, value))]),
    ),
  );
  return section("reproduce", "Make it again", parts);
}

function showPoint() {
  const drawn = [];
  const add = (part) => part && (drawn.push(part.draw || (() => {})), part.node);
  const detail = point.detail;
  const scroll = scrollY;
  const parts = [header(), warnings(point)];
  if (data.kind === "sweep") parts.push(add(curve(view, point.name, choosePoint)));
  parts.push(pointCard(point));
  if (detail) {
    list = layerTable(view, detail, layer, chooseLayer);
    parts.push(
      h("section", { id: "budget" }),
      h(".pair", null, list.node, h("section", { id: "layer" })),
      errors(detail),
      times(detail),
      graph(detail, chooseNode),
      skipped(detail),
    );
  }
  parts.push(
    reproduce(),
    h("footer", null, `Made by onnx-lowrank ${data.version}. This page is one file and needs no network.`),
  );
  document.getElementById("page").replaceChildren(...parts.filter(Boolean));
  if (detail && data.layers.length) {
    showBudget();
    showLayer();
  }
  drawn.forEach((again) => again());
  scrollTo(0, scroll);
}

showPoint();
document.documentElement.dataset.ready = "yes";
