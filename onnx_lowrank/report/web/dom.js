"use strict";
// Elements, numbers and texts. Names from a model come to the page as text nodes and attributes only.

const data = JSON.parse(document.getElementById("data").textContent);
const TITLES = { params: "Parameters", macs: "MACs", bytes: "File bytes", time: "Time", latency: "Time" };

/** An element: h("a.name", {href: …}, child, …); a child is a node, a text or nothing. */
function h(kind, attributes, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag || "div");
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""),
  );
  return made;
}

function isKnown(value) {
  return value !== null && value !== undefined;
}

/** A number to three digits, with an exponent where it is small or large. */
function number(value) {
  if (!isKnown(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e3) return String(Number(value.toPrecision(3)));
  return value.toExponential(1);
}

/** A bound to three digits, never rounded down. */
function bound(value) {
  if (!isKnown(value) || value === 0) return number(value);
  const step = 10 ** (Math.floor(Math.log10(value)) - 2);
  return number(Math.ceil(value / step - 1e-9) * step);
}

/** A whole number to three digits: 36.9k, 2.36M. */
function short(value) {
  if (!isKnown(value)) return "–";
  let size = value;
  let unit = "";
  for (const larger of ["k", "M", "G", "T"]) {
    if (size < 999.5) break;
    size /= 1000;
    unit = larger;
  }
  return unit ? `${Number(size.toPrecision(3))}${unit}` : String(value);
}

function exact(value) {
  return isKnown(value) ? value.toLocaleString("en-US") : "unknown";
}

function time(nanoseconds) {
  if (!isKnown(nanoseconds)) return "–";
  const [size, unit] = nanoseconds < 999500 ? [1e3, "µs"] : nanoseconds < 999.5e6 ? [1e6, "ms"] : [1e9, "s"];
  return `${Number((nanoseconds / size).toPrecision(3))} ${unit}`;
}

const MILLISECOND = 1e6; // nanoseconds

function percent(value) {
  if (!isKnown(value)) return "–";
  return value > 0 && value < 1e-4 ? "<0.01%" : `${(100 * value).toFixed(value < 0.1 ? 2 : 1)}%`;
}

/** A name from a model, which may break behind its separators. */
function nameOf(text) {
  return h(
    "bdi",
    null,
    text.split(/(?<=[./_:])/).map((part, index) => (index ? [h("wbr"), part] : part)),
  );
}

/** The weight of a layer as text: its groups, outputs, inputs and kernel. */
function shapeOf(layer) {
  const [groups, ...sizes] = layer.shape;
  return (groups > 1 ? `${groups}·` : "") + sizes.join("×");
}

/** A decomposition as text, such as "encode, 2 slices, rank 16 of 64". */
function optionText(row) {
  if (!row.option) return "kept";
  const [fold, k, j, lowering] = row.option;
  const way = ["narrow", "shared", "summed"].includes(lowering) ? lowering : fold;
  const rank = `${lowering === "narrow" ? "width" : "rank"} ${j}${row.full ? ` of ${row.full}` : ""}`;
  const rows = row.kept_rows ? `${exact(row.kept_rows)} rows stay` : "";
  return [way, k > 1 ? `${k} slices` : "", rank, rows].filter(Boolean).join(", ");
}

function section(id, title, ...children) {
  return h(
    "section.card",
    { id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title),
    children,
  );
}

/** A table: head and rows of cells; a cell is a node or a text. Numeric columns stand right. */
function table(head, rows, numeric = []) {
  const cell = (tag, content, index) =>
    h(numeric.includes(index) ? `${tag}.number` : tag, tag === "th" ? { scope: "col" } : null, content);
  return h(
    ".scroll",
    { tabindex: 0, role: "group", "aria-label": "Table" },
    h(
      "table",
      null,
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          head.map((content, index) => cell("th", content, index)),
        ),
      ),
      h(
        "tbody",
        null,
        rows.map((cells) =>
          h(
            "tr",
            null,
            cells.map((content, index) => cell("td", content, index)),
          ),
        ),
      ),
    ),
  );
}

function choose(label, entries, chosen, change) {
  const options = entries.map(([value, text]) => h("option", { value, selected: value === chosen }, text));
  return h(
    "label.choose",
    null,
    `${label} `,
    h("select", { onchange: (event) => change(event.target.value) }, options),
  );
}

function command(text) {
  const code = h("code", { tabindex: 0 }, text);
  const button = h("button.quiet", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    } catch {
      button.textContent = "Selected"; // A page from a disk may not write to the clipboard.
    }
  });
  return h(".command", null, code, button);
}
