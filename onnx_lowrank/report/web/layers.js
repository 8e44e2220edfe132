"use strict";
// The layers: the budget that each takes, the table of all, and the one that was chosen.

// The budget of parameters and of MACs has its own entry.
const AMOUNTS = {
  cost: { title: "Budget", write: exact, of: (layer, row) => row.cost || [null, null] },
  params: { title: "Parameters", write: exact, of: (layer, row) => [layer.params, row.params] },
  macs: { title: "MACs", write: exact, of: (layer, row) => [layer.macs, row.macs] },
  time: {
    title: "Time alone",
    write: time,
    of: (layer, row) => (row.time ? [row.time[0], row.time[2]] : [null, null]),
  },
  error: { title: "Error", write: number, of: (layer, row) => [null, row.error] },
  bound: { title: "Certified bound", write: number, of: (layer, row) => [null, row.bound] },
  held: { title: "Held-out error", write: percent, of: (layer, row) => [null, row.held] },
};

function budget(view, detail, chosen, chooseLayer, again) {
  const known = Object.entries(AMOUNTS).filter(
    ([key, amount]) =>
      data.layers.some((layer, index) => isKnown(amount.of(layer, detail.rows[index])[1])) &&
      !(key === "cost" && AMOUNTS[point.budget]),
  );
  if (!known.length) return null;
  if (!known.some(([key]) => key === view.amount)) view.amount = known[0][0];
  const amount = AMOUNTS[view.amount];
  const isTime = view.amount === "time" || (view.amount === "cost" && point.budget === "latency");
  const write = isTime ? time : amount.write;
  const size = (value) => (isTime && isKnown(value) ? value / MILLISECOND : value);
  const amounts = data.layers.map((layer, index) => {
    const [before, after] = amount.of(layer, detail.rows[index]);
    const text = isKnown(before) && before !== after ? `${write(before)} → ${write(after)}` : write(after);
    return { before: size(before), after: isKnown(after) ? size(after) : 0, text };
  });
  const place = chartPlace(`${amount.title} of every layer. The table of layers has the figures.`);
  const node = section(
    "budget",
    "Budget by layer",
    h(
      ".controls",
      null,
      choose(
        "Amount",
        known.map(([key, each]) => [key, key === "cost" ? `Budget (${point.budget})` : each.title]),
        view.amount,
        (value) => ((view.amount = value), again()),
      ),
    ),
    place,
    h("p.hint", null, detail.objective, " Choose a bar to see its layer."),
  );
  const title = isTime ? `${amount.title}, ms` : amount.title;
  return {
    node,
    draw: () =>
      draw(
        place,
        () => layerBars(data.layers, amounts, title, chosen, amount.write === exact && !isTime),
        (hit) => chooseLayer(hit.x),
      ),
  };
}

const COLUMNS = [
  {
    title: "#",
    key: (layer, row, index) => index,
    cell: (layer, row, index) => String(index + 1),
    number: true,
  },
  { title: "layer", key: (layer) => layer.name, name: true },
  {
    title: "operator",
    key: (layer) => layer.op,
    cell: (layer) => [layer.op, h(".hint", null, shapeOf(layer))],
    wide: true,
  },
  {
    title: "choice",
    key: (layer, row) => (row.option ? row.option[2] / (row.full || 1) : 2),
    cell: (layer, row) => h(".choice", null, optionText(row)),
    wide: true,
  },
  { title: "params", key: (layer, row) => layer.params - row.params, cell: paramsCell, number: true },
  { title: "error", key: (layer, row) => row.error, cell: (layer, row) => number(row.error), number: true },
  {
    title: "bound",
    key: (layer, row) => row.bound,
    cell: (layer, row) => bound(row.bound),
    number: true,
    wide: true,
  },
  {
    title: "held-out",
    key: (layer, row) => row.held,
    cell: (layer, row) => percent(row.held),
    number: true,
    wide: true,
  },
  {
    title: "time alone",
    key: (layer, row) => row.time && row.time[2],
    cell: (layer, row) => (row.time ? `${time(row.time[0])} → ${time(row.time[2])}` : "–"),
    number: true,
    wide: true,
  },
];

function paramsCell(layer, row) {
  if (row.params === layer.params) return short(layer.params);
  return [`${short(layer.params)} → ${short(row.params)}`, meter(row.params / layer.params)];
}

/** The table of all layers, which can be filtered and sorted. */
function layerTable(view, detail, chosen, chooseLayer) {
  const used = COLUMNS.filter(
    (column) =>
      column.name ||
      data.layers.some((layer, index) => isKnown(column.key(layer, detail.rows[index], index))),
  );
  const rows = data.layers.map((layer, index) => {
    const row = detail.rows[index];
    const cells = used.map((column) => {
      const content = column.name
        ? [
            h("button.name", { type: "button", onclick: () => chooseLayer(index) }, nameOf(layer.name)),
            h(".narrow.hint", null, optionText(row)),
          ]
        : column.cell(layer, row, index);
      const made = h("td", null, content);
      made.classList.toggle("number", Boolean(column.number));
      made.classList.toggle("wide", Boolean(column.wide));
      return made;
    });
    const line = h("tr", { "data-layer": index, onclick: () => chooseLayer(index) }, cells);
    line.classList.toggle("kept", !row.option);
    return line;
  });
  const body = h("tbody");
  const count = h("span.hint", { role: "status" });
  const heads = used.map((column) => {
    const head = h(
      "th",
      { scope: "col" },
      h("button", { type: "button", onclick: () => sort(column) }, column.title),
    );
    head.classList.toggle("number", Boolean(column.number));
    head.classList.toggle("wide", Boolean(column.wide));
    return head;
  });
  function sort(column) {
    view.falls = view.column === column.title ? !view.falls : Boolean(column.number) && column.title !== "#";
    view.column = column.title;
    arrange();
  }
  function arrange() {
    const column = used.find((each) => each.title === view.column) || used[0];
    const key = (index) => column.key(data.layers[index], detail.rows[index], index);
    const order = data.layers
      .map((_, index) => index)
      .sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (!isKnown(x) || !isKnown(y)) return isKnown(y) - isKnown(x) || a - b; // Unknown ones come last.
        const less = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return (view.falls ? -less : less) || a - b;
      });
    const word = view.filter.toLowerCase();
    const isShown = (index) => {
      const [layer, row] = [data.layers[index], detail.rows[index]];
      const isKind = view.kind === "all" || (view.kind === "rewritten") === Boolean(row.option);
      return (
        isKind &&
        [layer.name, layer.id, layer.op, ...layer.nodes].some((text) => text.toLowerCase().includes(word))
      );
    };
    const shown = order.filter(isShown);
    body.replaceChildren(...shown.map((index) => rows[index]));
    heads.forEach((head, index) => {
      const isMine = used[index] === column;
      if (isMine) head.setAttribute("aria-sort", view.falls ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    count.textContent = `${shown.length} of ${rows.length} layers`;
  }
  const filter = h("input", {
    type: "search",
    placeholder: "Filter layers",
    "aria-label": "Filter layers",
    value: view.filter,
    oninput: (event) => ((view.filter = event.target.value), arrange()),
  });
  const kinds = [
    ["all", "all"],
    ["rewritten", "rewritten"],
    ["kept", "kept"],
  ];
  const list = h(
    ".scroll.layers",
    { tabindex: 0, role: "group", "aria-label": "Layers" },
    h("table", null, h("thead", null, h("tr", null, heads)), body),
  );
  arrows(list);
  arrange();
  const mark = (index) =>
    rows.forEach((row, number) => {
      row.classList.toggle("chosen", number === index);
      row.querySelector("button.name").setAttribute("aria-pressed", String(number === index));
    });
  mark(chosen);
  const node = section(
    "layers",
    "Layers",
    h(
      ".controls",
      null,
      filter,
      choose("Show", kinds, view.kind, (value) => ((view.kind = value), arrange())),
      count,
    ),
    list,
    h("p.hint", null, `error: ${detail.measure}. bound: certified ‖W − Ŵ‖/‖W‖ of the factors as stored.`),
  );
  return { node, mark };
}

/** The chosen layer: spectrum and cut, alternatives, certificate, nodes. */
function layerCard(point, chosen, chooseLayer) {
  const layer = data.layers[chosen];
  const row = point.detail.rows[chosen];
  const curve = isKnown(row.curve) ? data.pool[row.curve] : null;
  const unit = point.budget === "latency" ? "ms" : point.budget;
  const costs = (entry) => ({
    ...entry,
    cost: point.budget === "latency" ? Number((entry.cost / MILLISECOND).toPrecision(3)) : entry.cost,
  });
  const entries = (isKnown(row.alternatives) ? data.pool[row.alternatives] : []).map(costs);
  const facts = [];
  const fact = (title, ...value) => facts.push(h("dt", null, title), h("dd", null, value));
  fact("operator", `${layer.op} ${shapeOf(layer)}, ${layer.dtype}`);
  fact("choice", optionText(row));
  if (row.reason) fact("kept because", row.reason);
  fact(
    "parameters",
    layer.params === row.params ? exact(row.params) : `${exact(layer.params)} → ${exact(row.params)}`,
  );
  if (isKnown(layer.macs))
    fact("MACs", layer.macs === row.macs ? exact(row.macs) : `${exact(layer.macs)} → ${exact(row.macs)}`);
  if (isKnown(row.error)) fact("error", `${number(row.error)} (${point.detail.measure.split(",")[0]})`);
  if (isKnown(row.bound))
    fact("certificate", `‖W − Ŵ‖₂ ≤ ${bound(row.bound)} ‖W‖₂, ‖W − Ŵ‖F ≤ ${bound(row.frobenius)} ‖W‖F`);
  if (row.fit)
    fact("fitted to", row.fit === "recovered" ? "activations, to make up for the layers before it" : row.fit);
  if (isKnown(row.held)) fact("held-out error", percent(row.held));
  if (row.time)
    fact(
      "time alone",
      `${time(row.time[0])} → ${time(row.time[2])}`,
      isKnown(row.time[1]) ? `, ${time(row.time[1])} predicted inside the model` : "",
    );
  if (row.joined)
    fact(
      "shares a factor with",
      row.joined.filter((id) => id !== layer.id).map((id) => [nameOf(id), " "]),
    );
  fact(
    "nodes",
    layer.nodes.map((name) => [nameOf(name), " "]),
  );
  if (layer.id !== layer.name) fact("weight", h("bdi", null, layer.id));
  const decays = chartPlace(
    `The error of the layer by rank${row.option ? `; the plan cuts at rank ${row.option[2]}` : ""}.`,
  );
  const others = chartPlace(
    "Other decompositions of the layer: what each costs, and how much it errs. The list below has the figures.",
  );
  const [keep, cost] = row.cost || [null, null];
  const mine =
    row.option && isKnown(cost)
      ? costs({ fold: row.option[0], k: row.option[1], j: row.option[2], cost, error: row.error })
      : null;
  const parts = [h("h3.layer-name", null, nameOf(layer.name)), h("dl.facts", null, facts)];
  if (curve) {
    const { fold, k } = curve;
    parts.push(
      h("h3", null, row.option ? "Spectrum and cut" : "Spectrum"),
      h("p.hint", null, `Of ${k > 1 ? `${k} slices` : "the whole weight"}, fold ${fold}.`),
      decays,
    );
  } else {
    parts.push(
      h("p.hint", null, "No decomposition of its own was scored for this layer, or the plan was replayed."),
    );
  }
  if (entries.length) {
    const rows = [...entries, ...(mine ? [mine] : [])]
      .sort((a, b) => a.cost - b.cost)
      .map((entry) => [
        entry === mine ? h("strong", null, "chosen: ", entry.fold) : entry.fold,
        String(entry.k),
        String(entry.j),
        exact(entry.cost),
        number(entry.error),
      ]);
    parts.push(
      h("h3", null, "Alternatives"),
      others,
      h(
        "details",
        null,
        h("summary", null, "As a list"),
        table(["fold", "slices", "rank", unit, "error"], rows, [1, 2, 3, 4]),
      ),
    );
  }
  const step = (by, text) =>
    h(
      "button.quiet",
      { type: "button", disabled: !data.layers[chosen + by], onclick: () => chooseLayer(chosen + by) },
      text,
    );
  const node = section(
    "layer",
    `Layer ${chosen + 1} of ${data.layers.length}`,
    h(
      ".controls",
      null,
      step(-1, "← previous"),
      step(1, "next →"),
      h("a", { href: "#layers" }, "all layers"),
    ),
    parts,
  );
  const drawAll = () => {
    if (curve) draw(decays, () => spectrum(curve, row, point.detail.measure.split(",")[0]));
    if (others.isConnected)
      draw(others, () =>
        alternatives(entries, mine, isKnown(keep) ? costs({ cost: keep }).cost : null, unit),
      );
  };
  return { node, draw: drawAll };
}
