"use strict";
// What a page says of the whole model: warnings, amounts, the curve of a sweep, errors, and the graph.

const AXES = {
  params: { title: "Parameters", of: (point) => point.shares.params, write: number },
  macs: { title: "MACs", of: (point) => point.shares.macs, write: number },
  bytes: { title: "File bytes", of: (point) => point.shares.bytes, write: number },
  latency: { title: "Time", of: (point) => point.shares.time, write: number },
};

/** The ways to judge a point: the values shown, and what is the smaller the better. */
const JUDGED = {
  error: {
    title: "Output error",
    of: (point) => point.error,
    loss: (point) => point.error,
    write: number,
    from: "tozero",
  },
  agreement: {
    title: "Agreement",
    of: (point) => point.agreement,
    loss: (point) => (isKnown(point.agreement) ? -point.agreement : null),
    write: percent,
    from: "normal",
  },
  score: {
    title: "Score",
    of: (point) => point.score,
    loss: (point) => (isKnown(point.score) ? -point.score : null),
    write: number,
    from: "normal",
  },
};

function warnings(point) {
  const detail = point.detail;
  const failed = data.points.filter((each) => each.note);
  const lines = [];
  if (detail && detail.worthless) {
    lines.push(
      h(
        "li.severe",
        null,
        h("strong", null, "Likely worthless: "),
        "the outputs have little to do with those of the input model.",
      ),
    );
  }
  for (const warning of detail ? detail.warnings : []) lines.push(h("li", null, warning));
  for (const each of failed)
    lines.push(h("li", null, h("strong", null, each.name), " has no model: ", each.note));
  if (!lines.length)
    return h("p.fine", { id: "warnings" }, h("span", { "aria-hidden": "true" }, "✓ "), "No warnings.");
  const title = lines.length === 1 ? "1 warning" : `${lines.length} warnings`;
  return h(
    "section.card.warnings",
    { id: "warnings", "aria-labelledby": "warnings-title" },
    h("h2", { id: "warnings-title" }, h("span", { "aria-hidden": "true" }, "⚠ "), title),
    h("ul", null, lines),
  );
}

function tiles(point) {
  const totals = point.detail ? point.detail.totals : {};
  const made = [];
  const tile = (title, value, note, share) =>
    made.push(
      h(
        ".tile",
        null,
        h(".title", null, title),
        h(".value", null, value),
        isKnown(share) ? meter(share) : null,
        h(".note", null, note),
      ),
    );
  for (const key of ["params", "macs", "bytes", "time"]) {
    const total = totals[key];
    const ratio = total ? total.ratio : point.shares[key];
    if (!isKnown(ratio)) continue;
    const write = key === "time" ? time : short;
    const note = total ? `${write(total.before)} → ${write(total.after)}` : "of the input model";
    const asked =
      key === point.budget || (key === "time" && point.budget === "latency")
        ? `, asked for ${number(point.asked)}`
        : "";
    tile(`${TITLES[key]}, ratio`, String(Number(ratio.toFixed(3))), note + asked, ratio);
  }
  if (isKnown(point.error)) tile("Output error", number(point.error), "largest of the outputs, about its mean where known");
  if (isKnown(point.agreement)) tile("Agreement", percent(point.agreement), "with the input model");
  if (isKnown(point.score)) tile("Score", number(point.score), `input model ${number(data.score)}`);
  return h(".tiles", null, made);
}

function meter(share) {
  const bar = h(".bar", null);
  bar.style.width = `${Math.min(100, 100 * share)}%`;
  return h(".meter", { "aria-hidden": "true" }, bar);
}

/** The curve of a sweep with the table of its points; `view` keeps the chosen axes. */
function curve(view, chosen, choosePoint) {
  const made = data.points.filter((point) => !point.note);
  const known = (axes) =>
    Object.entries(axes).filter(([, axis]) => made.some((point) => isKnown(axis.of(point))));
  const across = known(AXES);
  const up = known(JUDGED);
  if (!made.length || !across.length || !up.length) return null;
  if (!across.some(([key]) => key === view.x)) view.x = across[0][0];
  if (!up.some(([key]) => key === view.y)) view.y = up[0][0];
  const place = chartPlace(
    "The points of the sweep: what each costs, and how much it errs. The table below has all figures.",
    "chart.tall",
  );
  const judged = JUDGED[view.y];
  const axes = { x: AXES[view.x], y: judged, loss: judged.loss };
  const entries = (pairs) => pairs.map(([key, axis]) => [key, axis.title]);
  const best = new Set(frontOf(made, axes.x.of, axes.loss).map((point) => point.name));
  const recipes = new Set(made.map((point) => point.recipe)).size > 1 ? ["recipe"] : [];
  const figures = across.map(([, axis]) => axis).concat(up.map(([, axis]) => axis));
  const rows = made.map((point) => {
    const button = h(
      "button.name",
      {
        type: "button",
        "aria-pressed": String(point.name === chosen),
        onclick: () => choosePoint(point.name),
      },
      point.name,
    );
    return [
      h(
        "span",
        { role: "img", "aria-label": best.has(point.name) ? "on the front" : "beaten" },
        best.has(point.name) ? "●" : "○",
      ),
      [
        button,
        point.detail && point.detail.warnings.length
          ? h(
              "span.alarm",
              { role: "img", "aria-label": "with warnings", title: point.detail.warnings.join("\n") },
              " ⚠",
            )
          : null,
      ],
      ...recipes.map(() => point.recipe),
      ...figures.map((axis) => axis.write(axis.of(point))),
    ];
  });
  const list = table(
    ["", "point", ...recipes, ...figures.map((axis) => axis.title)],
    rows,
    figures.map((_, index) => index + 2 + recipes.length),
  );
  [...list.querySelectorAll("tbody tr")].forEach((row, index) => {
    row.classList.toggle("chosen", made[index].name === chosen);
    row.addEventListener("click", () => choosePoint(made[index].name));
  });
  arrows(list);
  const node = section(
    "curve",
    "Trade-off",
    h(
      ".controls",
      null,
      choose("Across", entries(across), view.x, (value) => ((view.x = value), view.again())),
      choose("Up", entries(up), view.y, (value) => ((view.y = value), view.again())),
    ),
    place,
    h(
      "p.hint",
      null,
      "● no other point has less of both axes, ○ another one does. Choose a point to see its model below.",
    ),
    list,
  );
  return {
    node,
    draw: () =>
      draw(
        place,
        () => tradeoff(made, axes, chosen),
        (hit) => hit.customdata && choosePoint(hit.customdata),
      ),
  };
}

/** Arrow keys move between the buttons of a table. */
function arrows(list) {
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...list.querySelectorAll("button.name")].filter((button) => button.offsetParent);
    const here = buttons.indexOf(document.activeElement);
    if (!step || here < 0) return;
    event.preventDefault();
    const next = buttons[here + step];
    if (next) next.focus();
  });
}

/** The figures, the files and the command of a point. */
function pointCard(point) {
  const facts = [];
  const fact = (title, value) => value && facts.push(h("dt", null, title), h("dd", null, value));
  fact("recipe", point.recipe);
  if (point.files) {
    fact("model", point.files.model);
    fact("plan", point.files.plan);
    fact("report", point.files.report);
  }
  fact("error on", point.inputs);
  return section(
    "point",
    point.name ? `Point ${point.name}` : "This model",
    tiles(point),
    point.name ? h("dl.facts", null, facts) : null,
    point.command
      ? [h("p.hint", null, "This command makes the model again from its plan:"), command(point.command)]
      : null,
    point.detail
      ? null
      : h("p.hint", null, "This page has no room for the layers of this point: its report file has them."),
  );
}

const FIGURES = [
  ["relative error", "relative", number],
  ["about the mean", "centred", number],
  ["largest difference", "largest", number],
  ["agreement", "agreement", percent],
  ["cosine", "cosine", (value) => (isKnown(value) ? value.toFixed(3) : "–")],
  ["neighbour kept", "neighbours", percent],
];

/** The largest error of several outputs, about the mean where that is known. */
function largest(outputs) {
  const errors = outputs.filter((each) => !each.is_exact).map((each) => each.centred ?? each.relative);
  const known = errors.filter(isKnown);
  return known.length ? Math.max(...known) : null;
}

/** Low-rank factors, the quantization, and both, each with its bytes and its error. */
function sideBySide(found, outputs) {
  const other = found.undecomposed;
  if (!other) return null;
  const rows = [
    ["low-rank alone", found.bytes, found.alone],
    [`${found.kind} alone`, other.bytes, other.outputs],
    [`low-rank, then ${found.kind}`, found.bytes_after, outputs],
  ].filter(([, bytes]) => isKnown(bytes));
  return h(
    "div",
    { id: "alone" },
    table(
      ["model", "bytes", "output error"],
      rows.map(([name, bytes, each]) => [name, short(bytes), number(largest(each))]),
      [1, 2],
    ),
    other.note ? h("p.hint", null, other.note) : null,
  );
}

/** What a quantization did; the errors before it are rows of the table. */
function quantized(found) {
  const reason = found.reason ? `, because ${found.reason}` : "";
  const sizes = `${short(found.bytes)} → ${short(found.bytes_after)} bytes`;
  return h(
    "p",
    { id: "quantized" },
    h("strong", null, `Quantized (${found.kind}): `),
    `${found.method}${reason}; ${found.refitted} weights fitted to it; ${sizes}. `,
    "Parameters, MACs, bounds and the graph below are those of the low-rank model before it.",
  );
}

function errors(detail) {
  const found = detail.validation;
  const parts = [];
  if (found) {
    const other = found.other;
    const rows = [];
    const judge = (output, kind) => rows.push({ output, kind });
    const isFamiliar = other && JSON.stringify(found.outputs) === JSON.stringify(other.familiar);
    for (const output of isFamiliar ? found.alone : found.outputs.concat(found.alone))
      judge(output, other ? "validation" : found.quantized ? `after ${found.quantized.kind}` : "");
    if (other) {
      for (const output of other.familiar) judge(output, other.kind);
      for (const output of other.outputs) judge(output, "check");
    }
    if (found.quantized) {
      const { kind, alone, undecomposed } = found.quantized;
      for (const output of alone) judge(output, `before ${kind}`);
      for (const output of undecomposed ? undecomposed.outputs : []) judge(output, `${kind} alone`);
    }
    rows.sort((a, b) => (a.output.name < b.output.name ? -1 : a.output.name > b.output.name ? 1 : 0));
    const known = FIGURES.filter(([, key]) => rows.some(({ output }) => isKnown(output[key])));
    parts.push(h("p", null, `${found.engine}, inputs ${found.inputs}.`));
    if (found.quantized)
      parts.push(quantized(found.quantized), sideBySide(found.quantized, found.outputs));
    if (other) parts.push(h("p", null, `Inputs of another kind (check): ${other.source}.`));
    const kinds = other ? ["inputs"] : found.quantized ? ["model"] : [];
    const head = ["output", ...kinds, ...known.map(([title]) => title)];
    const first = 1 + kinds.length;
    const line = ({ output, kind }) => [
      [nameOf(output.name), output.note ? h(".hint", null, output.note) : null],
      ...kinds.map(() => kind),
      ...known.map(([, key, write]) => write(output[key])),
    ];
    parts.push(
      table(
        head,
        rows.map(line),
        known.map((_, index) => index + first),
      ),
    );
    if (found.continuation) {
      const { prompts, tokens, agreement } = found.continuation;
      parts.push(
        h(
          "p",
          null,
          `Greedy continuation of ${prompts} prompts: ${percent(agreement)} of ${tokens} tokens agree.`,
        ),
      );
    }
    for (const note of found.notes) parts.push(h("p.hint", null, note));
  } else {
    parts.push(h("p", null, "The models were not compared: this was a dry run."));
  }
  if (detail.calibration) parts.push(h("p", null, `Calibration on ${detail.calibration.source}.`));
  if (detail.trials.length) {
    const rows = detail.trials.map((trial) => [
      trial.chosen ? h("span", { role: "img", "aria-label": "chosen" }, "●") : "",
      trial.recipe + (trial.recovered ? ", recovered" : ""),
      number(trial.ratio),
      number(trial.error),
      percent(trial.agreement),
      trial.note,
    ]);
    parts.push(
      h("h3", null, `Models that were tried${detail.then ? ", before the quantization" : ""}`),
      table(["", "recipe", "ratio", "output error", "agreement", ""], rows, [2, 3, 4]),
    );
  }
  return section("errors", "Errors at the outputs", parts);
}

function times(detail) {
  const timing = detail.timing;
  if (!timing) return null;
  const rows = [["whole model", time(timing.before), time(timing.predicted), time(timing.after)]];
  for (const call of timing.calls)
    rows.push([`${call.inputs} (weight ${number(call.weight)})`, time(call.before), "–", time(call.after)]);
  return section(
    "times",
    "Times",
    h("p", null, `Medians of interleaved runs on ${timing.engine}; inputs ${timing.inputs}.`),
    table(["", "before", "predicted", "after"], rows, [1, 2, 3]),
    timing.layers.length
      ? h("p.hint", null, "The times of single layers are among the amounts of “Budget by layer”.")
      : null,
  );
}

function nodeText(node) {
  const weights = node.weights.map((sizes) => sizes.join("×") || "scalar").join(", ");
  return [
    h("strong", null, node.op),
    " ",
    nameOf(node.name),
    weights ? h("span.weights", null, ` ${weights}`) : null,
  ];
}

/** The graph before and after: what both have is folded into lines. */
function graph(detail, chooseNode) {
  const found = detail.graph;
  const parts = [];
  if (!found) return section("graph", "Graph", h("p", null, "There is no new graph: this was a dry run."));
  const counts = Object.entries(found.operators).map(([name, total]) => [
    h("bdi", null, name),
    exact(total.before),
    exact(total.after),
  ]);
  const fused = (detail.validation && detail.validation.fused) || {};
  const lost = Object.entries(fused).filter(([, total]) => total.after < total.before);
  if (lost.length) {
    parts.push(
      h(
        "p.lost",
        null,
        h("strong", null, "Fusions lost: "),
        "ONNX Runtime no longer fuses ",
        lost.map(([name, total]) => `${total.before - total.after} of ${total.before} ${name}`).join(", "),
        ".",
      ),
    );
  } else if (Object.keys(fused).length) {
    parts.push(h("p", null, "ONNX Runtime fuses all operators that it fused before."));
  }
  if (detail.merges.length) {
    const rows = detail.merges.map((merged) => [
      h("bdi", null, merged.first),
      h("bdi", null, merged.second),
      exact(merged.saved),
      bound(Math.max(...merged.certificate.spectral)),
    ]);
    parts.push(
      h("h3", null, "Multiplied"),
      h("p.hint", null, "Adjacent linear operators became one, as the product is smaller."),
      table(["first", "second", "parameters saved", "bound"], rows, [2, 3]),
    );
  }
  if (detail.removed_inputs.length)
    parts.push(h("p", null, "Graph inputs removed: ", h("bdi", null, detail.removed_inputs.join(", ")), "."));
  if (counts.length)
    parts.push(h("h3", null, "Operators"), table(["operator", "before", "after"], counts, [1, 2]));
  const lines = [];
  let scope = "";
  for (const change of found.changes) {
    if (change.scope !== scope)
      lines.push(h(".scope", null, "in ", h("bdi", null, (scope = change.scope) || "the main graph")));
    const same = Object.entries(change.same);
    if (same.length)
      lines.push(
        h(".same", null, "⋯ ", same.map(([name, count]) => `${count} ${name}`).join(", "), " unchanged"),
      );
    if (!change.gone.length && !change.new.length) continue;
    const gone = change.gone.map((node) => {
      const known = chooseNode(node.name);
      const content = [h("span.sign", { "aria-label": "removed" }, "−"), ...nodeText(node)];
      return h("li", null, known ? h("button.name", { type: "button", onclick: known }, content) : content);
    });
    const fresh = change.new.map((node) =>
      h("li", null, h("span.sign", { "aria-label": "added" }, "+"), ...nodeText(node)),
    );
    lines.push(h(".change", null, h("ul.gone", null, gone), h("ul.fresh", null, fresh)));
  }
  parts.push(
    h("h3", null, "Before and after"),
    h(
      ".scroll.nodes",
      { tabindex: 0, role: "group", "aria-label": "Nodes before and after" },
      lines.length ? lines : h("p", null, "No node differs."),
    ),
  );
  return section("graph", "Graph", parts);
}

function skipped(detail) {
  const reasons = new Map();
  for (const item of detail.skipped) {
    reasons.set(item.reason, [...(reasons.get(item.reason) || []), item.name || item.weight || item.op]);
  }
  if (!reasons.size) return null;
  const groups = [...reasons].map(([reason, names]) =>
    h(
      "details",
      null,
      h("summary", null, `${names.length} × ${reason}`),
      h(
        "p",
        null,
        names.map((name) => [h("bdi", null, name), " "]),
      ),
    ),
  );
  return section("skipped", "Operators left alone", groups);
}
