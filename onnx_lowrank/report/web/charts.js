"use strict";
// Charts. Every one is drawn on demand, and drawn again when the colours or the width change.

const charts = new Map();
// Series differ by symbol, too: nobody has to tell colours apart.
const SYMBOLS = [
  "circle",
  "square",
  "diamond",
  "triangle-up",
  "pentagon",
  "star",
  "hexagon",
  "triangle-down",
];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function series(index) {
  return colour(`series-${index % 5}`);
}

/** Draw a chart in an element that is on the page. */
function draw(place, build, click) {
  const again = () => {
    const { traces, layout } = build();
    const axis = {
      gridcolor: colour("line"),
      zerolinecolor: colour("line"),
      linecolor: colour("line"),
      automargin: true,
    };
    const narrow = place.clientWidth < 480;
    const whole = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: narrow ? 11 : 12, color: colour("text") },
      margin: { l: 8, r: 12, t: 12, b: 8 },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      dragmode: false,
      width: place.clientWidth,
      height: place.clientHeight,
      ...layout,
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
    Plotly.react(place, traces, whole, { displayModeBar: false });
    if (click && !place.dataset.clicks) {
      place.dataset.clicks = "yes";
      place.on("plotly_click", (event) => click(event.points[0]));
    }
  };
  charts.set(place, again);
  again();
}

function redraw() {
  for (const [place, again] of charts) {
    if (!place.isConnected) charts.delete(place);
    else if (place.clientWidth) again();
  }
}

let waiting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(redraw);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
matchMedia("print").addEventListener("change", redraw);

function chartPlace(label, kind = "chart") {
  return h(`.${kind}`, { role: "img", "aria-label": label });
}

/** The points that no other one beats on two axes, both the smaller the better. */
function frontOf(points, x, y) {
  const known = points.filter((point) => isKnown(x(point)) && isKnown(y(point)));
  const beats = (a, b) => x(a) <= x(b) && y(a) <= y(b) && (x(a) < x(b) || y(a) < y(b));
  return known.filter((point) => !known.some((other) => beats(other, point))).sort((a, b) => x(a) - x(b));
}

/** The curve of all points: traces by recipe and budget, the front, and the chosen point. */
function tradeoff(points, axes, chosen) {
  const { x, y, loss } = axes;
  const shown = points.filter((point) => isKnown(x.of(point)) && isKnown(y.of(point)));
  const front = frontOf(shown, x.of, loss);
  const isBest = new Set(front.map((point) => point.name));
  const groups = new Map();
  for (const point of shown) {
    const name = escapeMarkup(`${point.recipe}, ratio of ${point.budget}`);
    groups.set(name, [...(groups.get(name) || []), point]);
  }
  const traces = [
    {
      x: front.map(x.of),
      y: front.map(y.of),
      name: "Pareto front",
      mode: "lines",
      hoverinfo: "skip",
      line: { color: colour("muted"), width: 2, dash: "dot" },
    },
  ];
  [...groups].forEach(([name, members], index) => {
    const symbols = members.map((p) => SYMBOLS[index % SYMBOLS.length] + (isBest.has(p.name) ? "" : "-open"));
    traces.push({
      x: members.map(x.of),
      y: members.map(y.of),
      name,
      mode: "markers",
      cliponaxis: false,
      customdata: members.map((point) => point.name),
      text: members.map(
        (point) =>
          `${escapeMarkup(point.name)}<br>${x.title} ${x.write(x.of(point))}<br>${y.title} ${y.write(y.of(point))}`,
      ),
      hovertemplate: "%{text}<extra></extra>",
      marker: {
        symbol: symbols,
        size: members.map((p) => (isBest.has(p.name) ? 13 : 10)),
        opacity: 1,
        color: series(index),
        line: { width: 2, color: series(index) },
      },
    });
  });
  const mine = shown.filter((point) => point.name === chosen);
  traces.push({
    x: mine.map(x.of),
    y: mine.map(y.of),
    name: "chosen",
    mode: "markers",
    cliponaxis: false,
    hoverinfo: "skip",
    showlegend: false,
    marker: { symbol: "circle-open", size: 24, color: colour("text"), line: { width: 2.5 } },
  });
  const layout = {
    xaxis: { title: { text: `${x.title}, share of the input model` }, rangemode: "tozero" },
    yaxis: {
      title: { text: y.title },
      type: axes.log ? "log" : "linear",
      rangemode: axes.log ? "normal" : y.from,
    },
    hovermode: "closest",
  };
  return { traces, layout, best: isBest };
}

/** One amount of every layer: what is left of it, in front of what there was. */
function layerBars(layers, amounts, title, chosen, isCount) {
  const index = layers.map((_, number) => number);
  const names = layers.map((layer) => layer.name);
  const after = amounts.map((amount) => amount.after);
  const text = amounts.map((amount, n) => `${n + 1} ${escapeMarkup(names[n])}<br>${amount.text}`);
  const traces = [];
  if (amounts.some((amount) => isKnown(amount.before))) {
    traces.push({
      type: "bar",
      name: "saved",
      x: index,
      y: amounts.map((a) => (isKnown(a.before) && isKnown(a.after) ? Math.max(0, a.before - a.after) : 0)),
      base: after,
      text,
      textposition: "none",
      hovertemplate: "%{text}<extra></extra>",
      marker: {
        color: colour("saved"),
        line: { color: colour("series-0"), width: layers.length > 80 ? 0 : 1 },
        pattern: {
          shape: layers.length > 80 ? "" : "/",
          fgcolor: colour("series-0"),
          size: 6,
          solidity: 0.15,
        },
      },
    });
  }
  const left = (name, isMine, marker) => {
    const members = index.filter(isMine);
    const pick = (values) => members.map((n) => values[n]);
    traces.push({
      type: "bar",
      name,
      x: members,
      y: pick(after),
      text: pick(text),
      textposition: "none",
      hovertemplate: "%{text}<extra></extra>",
      marker,
    });
  };
  left("left", (n) => n !== chosen, { color: colour("series-0") });
  left("chosen layer", (n) => n === chosen, { color: colour("series-1") });
  const layout = {
    barmode: "overlay",
    bargap: layers.length > 80 ? 0 : 0.15,
    xaxis: {
      title: { text: "layer, in the order of the graph" },
      tickvals: ticks(layers.length),
      ticktext: ticks(layers.length).map((n) => n + 1),
      range: [-0.6, layers.length - 0.4],
    },
    yaxis: { title: { text: title }, rangemode: "tozero", tickformat: isCount ? "~s" : "" },
    showlegend: true,
    hovermode: "closest",
  };
  return { traces, layout };
}

function ticks(count) {
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((size) => count / size <= 15) || 2000;
  const found = [];
  for (let number = step - 1; number < count; number += step) found.push(number);
  return step > 1 ? [0, ...found] : found;
}

// Plotly reads a few HTML tags in texts; names from a model are not meant as such.
function escapeMarkup(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** A logarithmic axis for some values: its ticks are powers of 10, or 1, 2 and 5 times these. */
function logarithmic(values) {
  const known = values.filter((value) => value > 0);
  const from = Math.floor(Math.log10(Math.min(...known)));
  const to = Math.ceil(Math.log10(Math.max(...known)));
  const digits = to - from <= 2 ? [1, 2, 5] : [1];
  const step = Math.ceil((to - from) / 6);
  const tickvals = [];
  for (let power = to; power >= from; power -= step)
    tickvals.push(...digits.map((digit) => digit * 10 ** power));
  return { type: "log", tickvals, ticktext: tickvals.map(number) };
}

/** The error of a layer by rank, with its singular values, and the rank where the plan has cut. */
function spectrum(curve, row, measure) {
  const cut = row.option && row.option[0] === curve.fold && row.option[1] === curve.k ? row.option[2] : null;
  const traces = [
    {
      x: curve.ranks,
      y: curve.errors,
      name: `error (${measure})`,
      mode: "lines",
      line: { color: series(0), width: 2.5 },
      hovertemplate: "rank %{x}: error %{y:.3g}<extra></extra>",
    },
  ];
  if (curve.values.length && curve.values[0] > 0) {
    traces.push({
      x: curve.ranks,
      y: curve.values.map((value) => value / curve.values[0]),
      name: "next singular value / largest",
      mode: "lines+markers",
      line: { color: series(1), width: 1.5, dash: "dot" },
      marker: { size: 4, symbol: "square" },
      hovertemplate: "behind rank %{x}: σ/σ₁ %{y:.3g}<extra></extra>",
    });
  }
  const shapes = [];
  const annotations = [];
  if (cut !== null) {
    shapes.push(
      {
        type: "rect",
        xref: "x",
        yref: "paper",
        x0: curve.ranks[0],
        x1: cut,
        y0: 0,
        y1: 1,
        fillcolor: colour("saved"),
        line: { width: 0 },
        layer: "below",
      },
      {
        type: "line",
        xref: "x",
        yref: "paper",
        x0: cut,
        x1: cut,
        y0: 0,
        y1: 1,
        line: { color: colour("text"), width: 1.5, dash: "dash" },
      },
    );
    const isRight = cut < (curve.ranks[0] + curve.ranks[curve.ranks.length - 1]) / 2;
    annotations.push({
      x: cut,
      y: 1,
      xref: "x",
      yref: "paper",
      text: `cut at rank ${cut}`,
      showarrow: false,
      xanchor: isRight ? "left" : "right",
      yanchor: "top",
      xshift: isRight ? 6 : -6,
      font: { color: colour("text") },
    });
  }
  return {
    traces,
    layout: {
      shapes,
      annotations,
      xaxis: { title: { text: "rank of a slice" } },
      yaxis: logarithmic(traces.flatMap((trace) => trace.y)),
      hovermode: "x",
    },
  };
}

/** The decompositions that a layer could have had, and the one that it got, if its cost is known. */
function alternatives(found, chosen, keep, unit) {
  const text = (entry) => `${entry.fold}, ${entry.k > 1 ? `${entry.k} slices, ` : ""}rank ${entry.j}`;
  const isMine = (entry) =>
    chosen && entry.fold === chosen.fold && entry.k === chosen.k && entry.j === chosen.j;
  const others = found.filter((entry) => !isMine(entry));
  const trace = (entries, name, marker) => ({
    x: entries.map((entry) => entry.cost),
    y: entries.map((entry) => entry.error),
    name,
    mode: "markers",
    cliponaxis: false,
    marker,
    text: entries.map(text),
    hovertemplate: `%{text}<br>%{x:,} ${unit}, error %{y:.3g}<extra></extra>`,
  });
  const traces = [
    trace(others, "others", { symbol: "circle-open", size: 9, color: series(0), line: { width: 2 } }),
    trace(chosen ? [chosen] : [], "chosen", { symbol: "diamond", size: 14, color: series(1) }),
  ];
  const known = found.map((entry) => entry.error).filter((error) => error > 0);
  const isWide = known.length > 1 && Math.max(...known) > 50 * Math.min(...known);
  const shapes = [];
  const annotations = [];
  if (isKnown(keep)) {
    shapes.push({
      type: "line",
      xref: "x",
      yref: "paper",
      x0: keep,
      x1: keep,
      y0: 0,
      y1: 1,
      line: { color: colour("text"), width: 1.5, dash: "dash" },
    });
    annotations.push({
      x: keep,
      y: 1,
      xref: "x",
      yref: "paper",
      text: chosen ? "kept" : "kept: the choice",
      showarrow: false,
      xanchor: "right",
      yanchor: "top",
      xshift: -6,
      font: { color: colour("text") },
    });
  }
  const axis = isWide ? logarithmic(known) : { rangemode: "tozero" };
  const layout = {
    shapes,
    annotations,
    xaxis: { title: { text: unit }, rangemode: "tozero", tickformat: "~s" },
    yaxis: { title: { text: "error" }, ...axis },
    hovermode: "closest",
  };
  return { traces, layout };
}
