"use strict";
// Draws the data that page.py wrote. Everything follows from `data` and `state`: a control changes the state and calls draw().

let data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches; // there a drag scrolls the page, so it must not zoom
const WINDOWS = [0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2]; // smoothing, as shares of the longest run

const state = {
  axis: data.look.axis,
  logX: data.look.log_x,
  smoothing: data.look.smooth, // steps
  outliers: false,
  range: null, // [from, to] on the x axis; null is the whole run
  off: new Set(), // names of runs that are switched off
  events: new Set(Object.keys(data.events).filter((kind) => data.events[kind].shown && (kind !== "save" || data.runs.length === 1))),
  sort: null, // [column, 1 or -1]
  panels: {}, // title: {log, zoom}, as the reader set them
  folded: new Set(data.sections.filter((section) => section.folded).map((section) => section.name)),
};

// Create an element: el("a", {href: "#"}, "text", child).
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const matches = (text, field) => text.toLowerCase().includes($(field).value.trim().toLowerCase());
const isHidden = (i) => state.off.has(data.runs[i].name) || !matches(data.runs[i].name, "names");
const lastStep = () => Math.max(...data.runs.map((run) => run.summary.steps));

// ---------------------------------------------------------------- numbers

// The steps (rising) on the x axis in use, by interpolation in the run's own table.
function onAxis(run, steps) {
  if (state.axis === "step") return steps;
  const table = data.runs[run].axes[state.axis];
  if (!table) return steps.map(() => null);
  let i = 0;
  return steps.map((step) => {
    while (i < table.step.length - 2 && table.step[i + 1] < step) i++;
    if (table.step.length === 1) return table.value[0];
    const share = (step - table.step[i]) / (table.step[i + 1] - table.step[i]);
    return table.value[i] + Math.min(1, Math.max(0, share)) * (table.value[i + 1] - table.value[i]);
  });
}

// Average over about `window` steps to each side: as thin.smooth in Python does. A null stays one and counts nowhere.
const smooth = (steps, values, window) => average(steps, average(steps, values, window / 2), window / 2);

function average(steps, values, reach) {
  const sums = [0], counts = [0];
  values.forEach((value, i) => { sums.push(sums[i] + (value ?? 0)); counts.push(counts[i] + (value === null ? 0 : 1)); });
  let first = 0, end = 0;
  return values.map((value, i) => {
    const before = Math.min(reach, steps[i] - steps[0]);
    const after = Math.min(before, steps[steps.length - 1] - steps[i]);
    while (first < i && steps[first] < steps[i] - before) first++;
    while (first > 0 && steps[first - 1] >= steps[i] - before) first--;
    while (end < steps.length && steps[end] <= steps[i] + after) end++;
    while (end > i + 1 && steps[end - 1] > steps[i] + after) end--;
    return value === null ? null : (sums[end] - sums[first]) / (counts[end] - counts[first]);
  });
}

const short = (value, digits = 3) => {
  if (value === null || value === undefined) return "–";
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size) return +(value / size).toPrecision(digits) + letter;
  return String(+value.toPrecision(digits));
};
function duration(seconds) {
  if (seconds === null) return "–";
  for (const [size, name] of [[172800, "d"], [3600, "h"], [60, "min"]])
    if (seconds >= size) return `${short(seconds / { d: 86400, h: 3600, min: 60 }[name])} ${name}`;
  return `${short(seconds)} s`;
}

// ---------------------------------------------------------------- colours

const color = (hue) => { const c = data.colors[dark.matches ? "dark" : "light"]; return c[hue % c.length]; };
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

// With one run, colour marks the curve; with several, colour marks the run and the dash marks the curve.
function look(panel, curve) {
  const index = [...new Set(panel.curves.map((c) => c.name))].indexOf(curve.name);
  if (data.runs.length > 1) return { color: color(data.runs[curve.run].hue), dash: data.dashes[index % data.dashes.length] };
  return { color: color(index), dash: data.dashes[Math.floor(index / data.colors.light.length) % data.dashes.length] };
}

// ---------------------------------------------------------------- panels

const isEvaluation = (curve) => curve.metric.startsWith("eval/");

function curveTraces(panel, curve) {
  const { color, dash } = look(panel, curve);
  const label = data.runs.length > 1 ? (panel.curves.some((c) => c.name !== curve.name) ? `${data.runs[curve.run].name} · ${curve.name}` : data.runs[curve.run].name) : curve.name;
  const smoothed = state.smoothing > 0 && panel.smooth && !isEvaluation(curve);
  const dots = isEvaluation(curve) && curve.step.length <= 100;
  const base = { type: "scatter", yaxis: "y", name: label, line: { color, dash, width: isEvaluation(curve) ? 2 : 1.5 } };
  const raw = { ...base, x: onAxis(curve.run, curve.step), y: curve.value, mode: dots || curve.step.length === 1 ? "lines+markers" : "lines", marker: { color, size: 5 } };
  if (!smoothed) return [raw, ...oddTrace(curve, label, color)];
  const points = curve.mean ?? curve;
  const mean = { ...base, x: onAxis(curve.run, points.step), y: smooth(points.step, points.value, state.smoothing), mode: "lines", line: { color, dash, width: 2 } };
  return [{ ...raw, opacity: 0.28, hoverinfo: "skip", line: { color, width: 1 } }, mean, ...oddTrace(curve, label, color)];
}

// NaN and infinity have no place on an axis: they are gaps, marked at the top.
function oddTrace(curve, label, color) {
  if (!curve.odd) return [];
  const steps = Object.keys(curve.odd).map(Number);
  const text = steps.map((step) => `${curve.odd[step]} at step ${step}`);
  return [{ type: "scatter", yaxis: "y2", mode: "markers", name: label, x: onAxis(curve.run, steps), y: steps.map(() => 0.5), text,
            hovertemplate: "%{text}", marker: { color, size: 9, symbol: "circle-x-open" } }];
}

// Marks have a strip above the curves, the second y axis.
function eventTraces() {
  const traces = [], several = data.runs.length > 1;
  data.runs.forEach((run, i) => {
    for (const [kind, mark] of Object.entries(data.events).reverse()) {
      const events = run.events[kind];
      if (isHidden(i) || !state.events.has(kind) || !events.length) continue;
      const text = events.map((e) => `${kind} at step ${e.step}` + (e.text ? `<br>${e.text}` : ""));
      traces.push({ type: "scatter", yaxis: "y2", mode: "markers", x: onAxis(i, events.map((e) => e.step)), y: events.map(() => 0.5), text,
                    hovertemplate: `%{text}<extra>${several ? run.name : ""}</extra>`, showlegend: false,
                    marker: { color: several ? color(run.hue) : dark.matches ? mark.dark_color : mark.color, symbol: mark.plotly, size: kind === "save" ? 5 : 9 } });
    }
  });
  return traces;
}

// Hidden runs and the x range decide what is in sight; y follows it unless the reader zoomed y himself.
function fitY(panel, traces) {
  const seen = [];
  for (const trace of traces) {
    if (trace.yaxis !== "y") continue;
    trace.x.forEach((x, i) => {
      const y = trace.y[i];
      if (x === null || y === null || (panel.log && y <= 0)) return;
      if (state.range && (x < state.range[0] || x > state.range[1])) return;
      seen.push(panel.log ? Math.log10(y) : y);
    });
  }
  if (!seen.length) return undefined;
  seen.sort((a, b) => a - b);
  const cut = state.outliers ? Math.floor(seen.length * 0.01) : 0;
  const [low, high] = [seen[cut], seen[seen.length - 1 - cut]];
  if (low === 0 && high === 0) return [-0.05, 1];
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.05;
  return [low - pad, high + pad];
}

function xRange() {
  const range = state.range ?? wholeRange();
  return state.logX ? range.map((v) => Math.log10(Math.max(v, wholeRange(true)[0]))) : range;
}

function wholeRange(positive = false) {
  const steps = data.panels.flatMap((panel) => panel.curves.filter((c) => !isHidden(c.run)).map((c) => {
    const from = positive ? c.step.find((step) => step > 0) : c.step[0];
    return onAxis(c.run, [from ?? c.step[0], c.step[c.step.length - 1]]);
  })).filter((ends) => ends[0] !== null);
  if (!steps.length) return [0, 1];
  const low = Math.min(...steps.map((e) => e[0])), high = Math.max(...steps.map((e) => e[1]));
  if (state.logX || positive) return [Math.max(low, high * 1e-7), high];
  const pad = (high - low) * 0.01 || 0.5;
  return [low - pad, high + pad];
}

function layout(panel, traces) {
  const axis = { gridcolor: css("grid"), linecolor: css("line"), zeroline: false, automargin: true, tickfont: { color: css("soft"), size: 11 } };
  const exponent = state.axis === "tokens" ? "B" : state.axis === "flops" ? "power" : "SI";
  return {
    margin: { l: 48, r: panel.limits.length ? 52 : 10, t: 4, b: 36 }, width: panel.plot.clientWidth || 480, height: panel.plot.clientHeight || 260, showlegend: false, hovermode: "x unified", dragmode: touch ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    hoverlabel: { bgcolor: css("paper"), bordercolor: css("line"), font: { color: css("ink"), size: 12 }, namelength: -1 },
    xaxis: { ...axis, type: state.logX ? "log" : "linear", range: xRange(), ...(state.logX ? logTicks(...xRange()) : { exponentformat: exponent, nticks: 8, dtick: wholeSteps() }),
             title: { text: data.axes[state.axis], font: { color: css("soft"), size: 12 }, standoff: 6 }, showline: true,
             hoverformat: state.axis === "step" ? ",d" : ".4s" },
    yaxis: { ...axis, domain: [0, 0.94], type: panel.log ? "log" : "linear", range: panel.zoom ?? fitY(panel, traces), hoverformat: ".6~g", ...yTicks(panel, traces) },
    yaxis2: { domain: [0.94, 1], range: [0, 1], fixedrange: true, visible: false },
    ...limitLines(panel),
  };
}

// 1, 2, 5 on a log axis of up to three decades, on a longer one the powers of ten. `low` and `high` are logarithms.
function logTicks(low, high) {
  const span = high - low;
  if (span < 0.4) return { nticks: 6 };
  const digits = span < 0.9 ? [1, 2, 3, 5] : span < 1.7 ? [1, 2, 5] : span < 3 ? [1, 3] : [1];
  const every = span < 7 ? 1 : Math.ceil(span / 6);
  const tickvals = [];
  for (let power = Math.floor(low); power <= high; power++)
    if (power % every === 0) tickvals.push(...digits.map((digit) => Number(`${digit}e${power}`)));
  const plain = (value) => value >= 1e-3 && value < 1e15;
  return { tickvals, ticktext: tickvals.map((value) => (plain(value) ? short(value) : value.toExponential().replace("+", ""))) };
}

function yTicks(panel, traces) {
  const [low, high] = panel.zoom ?? fitY(panel, traces) ?? [0, 1];
  if (panel.log) return logTicks(low, high);
  return { nticks: 7, exponentformat: Math.abs(high) < 0.01 ? "e" : "SI", minexponent: Math.abs(high) < 0.01 ? 2 : 4 };
}

function limitLines(panel) {
  const values = [...new Set(panel.limits.filter((l) => !isHidden(l.run)).map((l) => l.value))];
  return {
    shapes: values.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, yref: "y", y0: y, y1: y, line: { color: css("soft"), width: 1, dash: "dot" } })),
    annotations: values.map((y) => ({ text: `${panel.limit_name} ${y}`, xref: "paper", x: 1, xanchor: "left", yref: "y", y: panel.log ? Math.log10(y) : y,
                                      showarrow: false, font: { size: 11, color: css("soft") } })),
  };
}

function draw(only) {
  for (const panel of only ? [only] : data.panels) {
    const shown = panel.curves.filter((c) => !isHidden(c.run));
    const curves = shown.flatMap((curve) => curveTraces(panel, curve));
    Plotly.react(panel.plot, [...curves, ...eventTraces()], layout(panel, curves), { displayModeBar: false, doubleClick: false });
    const last = (c) => `${data.runs.length > 1 ? data.runs[c.run].name + ", " : ""}${c.name} ${short(c.value[c.value.length - 1], 4)} at step ${c.step[c.step.length - 1]}`;
    panel.plot.setAttribute("aria-label", `${panel.title}: ${shown.map(last).join("; ") || "no run is shown"}`);
    drawLegend(panel);
  }
}

// A slider moves faster than a long run is drawn.
let drawing = false;
function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; draw(); });
}

// Between two steps there is none, so a short range needs no fractions.
function wholeSteps() {
  const [low, high] = xRange();
  return state.axis === "step" && high - low < 8 ? 1 : undefined;
}

function drawLegend(panel) {
  const names = new Map(panel.curves.map((curve) => [curve.name, curve]));
  panel.legend.replaceChildren();
  for (const [name, curve] of names.size < 2 ? [] : names) {
    const { color, dash } = look(panel, curve);
    const stroke = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3" }[dash];
    const item = el("li");
    item.innerHTML = `<svg viewBox="0 0 22 8" aria-hidden="true"><line x1="0" y1="4" x2="22" y2="4" stroke-width="2" stroke-dasharray="${stroke}"/></svg>`;
    item.querySelector("line").setAttribute("stroke", data.runs.length > 1 ? css("soft") : color);
    item.append(name);
    panel.legend.append(item);
  }
}

function buildPanels() {
  $("panels").replaceChildren();
  if (data.hues.length > 1 && data.hues.length < data.runs.length)
    $("panels").append(el("ul", { className: "hues" }, ...data.hues.map((name, i) => el("li", {}, swatch(i), ` ${name}`))));
  for (const { name } of data.sections) {
    const panels = data.panels.filter((panel) => panel.section === name);
    if (!panels.length) continue;
    const grid = el("div", { className: "grid" }, ...panels.map(buildPanel));
    const details = el("details", { open: !state.folded.has(name) }, el("summary", {}, el("h2", {}, name)), grid);
    details.ontoggle = () => {
      if (!$("metrics").value) details.open ? state.folded.delete(name) : state.folded.add(name);
      if (details.open) panels.forEach((panel) => draw(panel));
    };
    $("panels").append(details);
  }
}

function buildPanel(panel) {
  const mine = (state.panels[panel.title] ??= { log: panel.log, zoom: null });
  const box = el("input", { type: "checkbox", checked: mine.log });
  Object.assign(panel, mine);
  box.onchange = () => { panel.log = mine.log = box.checked; panel.zoom = mine.zoom = null; draw(panel); };
  panel.plot = el("div", { className: "plot", role: "img" });
  panel.legend = el("ul", { className: "legend" });
  const header = el("header", {}, el("h3", {}, panel.title), el("span", { className: "unit" }, panel.unit), el("label", {}, box, " log y"));
  panel.place = el("section", { className: panel.title === "Loss" ? "panel first" : "panel", "aria-label": panel.title }, header, panel.legend, panel.plot);
  return panel.place;
}

// The fields that filter metrics and runs.
function filter() {
  for (const panel of data.panels)
    panel.place.hidden = ![panel.title, ...panel.curves.map((c) => c.metric)].some((text) => matches(text, "metrics"));
  for (const details of $("panels").querySelectorAll("details")) {
    details.hidden = !details.querySelector(".panel:not([hidden])");
    details.open = $("metrics").value !== "" || !state.folded.has(details.querySelector("h2").textContent);
  }
  data.runs.forEach((run) => { run.line.hidden = !matches(run.name, "names"); });
  draw();
}

// A zoom in x is every panel's; y then fits what is in sight, except where the reader drew a box of his own.
function linkZoom(panel) {
  panel.plot.on("plotly_relayout", (change) => {
    if (change["xaxis.range[0]"] === undefined && change["yaxis.range[0]"] === undefined) return;
    if (change["yaxis.range[0]"] !== undefined) panel.zoom = state.panels[panel.title].zoom = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
    if (change["xaxis.range[0]"] !== undefined) {
      const range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      state.range = state.logX ? range.map((v) => 10 ** v) : range;
      $("range").value = "zoom";
    }
    draw();
  });
  panel.plot.on("plotly_doubleclick", () => setRange(0));
}

function setRange(share) {
  data.panels.forEach((panel) => { panel.zoom = state.panels[panel.title].zoom = null; });
  state.range = null;
  if (share > 0) { const [low, high] = wholeRange(); state.range = [low + share * (high - low), high]; }
  $("range").value = String(share);
  draw();
}

// ---------------------------------------------------------------- heading and tables

const swatch = (hue) => el("span", { className: "swatch", style: `background: ${color(hue)}` });
// Wide tables scroll, which the keyboard must reach.
const scrolling = (table, name) => el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": name }, table);

function buildHeading() {
  const { runs } = data, [run] = runs;
  document.querySelector("h1").textContent = runs.length > 4 ? `${runs.length} runs` : runs.map((r) => r.name).join(" · ");
  const facts = [run.state, run.about.machine, run.about.parameters && `${run.about.parameters} parameters`, run.about.date && `started ${run.about.date}`];
  document.querySelector("#heading p").textContent = runs.length > 1 ? "" : facts.filter(Boolean).join(" · ");
}

// Columns of the table of runs: [title, value, text, which value is best].
const loss = (v) => (v === null ? "–" : v.toFixed(4));
const COLUMNS = [
  ["run", (run) => run.name, (v) => v],
  ["state", (run) => run.state, (v) => v || "–"],
  ["training loss", (run) => run.summary.training, loss, Math.min],
  ["validation loss", (run) => run.summary.validation, loss, Math.min],
  ["steps", (run) => run.summary.steps, (v) => v.toLocaleString("en")],
  ["tokens", (run) => run.summary.tokens, (v) => short(v)],
  ["time", (run) => run.summary.seconds, duration],
  ["tokens/s", (run) => run.summary.speed, (v) => short(v), Math.max],
  ["events", (run) => Object.values(run.summary.events).reduce((a, b) => a + b, 0),
   (v, run) => Object.entries(run.summary.events).map(([kind, n]) => `${n} ${kind}${n > 1 ? "s" : ""}`).join(", ") || "–"],
  ["parameters", (run) => run.about.parameters ?? null, (v) => v ?? "–"],
  ["machine", (run) => run.about.machine ?? null, (v) => v ?? "–"],
  ["date", (run) => run.about.date ?? null, (v) => v ?? "–"],
];

function buildRuns() {
  const several = data.runs.length > 1, columns = several ? COLUMNS.filter(([, value]) => data.runs.some(value)) : COLUMNS.slice(2, 9);
  const head = el("tr"), body = el("tbody");
  const kind = (i) => (["run", "state", "events", "machine", "date"].includes(columns[i][0]) ? "" : "number");
  columns.forEach(([title], i) => {
    const th = el("th", { scope: "col", className: kind(i) }, several ? el("button", { type: "button" }, title) : title);
    if (several) th.onclick = () => { state.sort = [title, state.sort?.[0] === title ? -state.sort[1] : 1]; buildRuns(); $("runs").querySelectorAll("button")[i].focus(); };
    if (state.sort?.[0] === title) th.ariaSort = state.sort[1] > 0 ? "ascending" : "descending";
    head.append(th);
  });
  const best = columns.map(([, value, , choose]) => {
    const values = data.runs.map(value).filter((v) => v !== null);
    return choose && new Set(values).size > 1 ? choose(...values) : null;
  });
  const order = data.runs.map((_, i) => i);
  const by = columns.find(([title]) => title === state.sort?.[0])?.[1];
  if (by) order.sort((a, b) => {
    const [x, y] = [by(data.runs[a]), by(data.runs[b])];
    if (x === null || y === null) return (x === null) - (y === null); // unknown values last
    return state.sort[1] * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  });
  for (const i of order) {
    const run = data.runs[i];
    run.line = el("tr", { hidden: !matches(run.name, "names"), className: state.off.has(run.name) ? "off" : "" });
    columns.forEach(([title, value, text], c) => {
      const cell = el(title === "run" ? "th" : "td", { className: kind(c) });
      if (title === "run") {
        const box = el("input", { type: "checkbox", checked: !state.off.has(run.name) });
        box.onchange = () => { box.checked ? state.off.delete(run.name) : state.off.add(run.name); run.line.classList.toggle("off", !box.checked); draw(); };
        cell.scope = "row";
        cell.append(el("label", {}, box, swatch(run.hue), run.name));
      } else cell.append(text(value(run), run));
      if (best[c] !== null && value(run) === best[c]) { cell.classList.add("best"); cell.title = "best"; }
      run.line.append(cell);
    });
    body.append(run.line);
  }
  $("runs").replaceChildren(scrolling(el("table", {}, el("thead", {}, head), body), "Table of runs"));
}

function buildConfiguration() {
  const { runs, rows } = data.differences, place = $("configuration"), one = runs.length === 1;
  const wasOpen = place.querySelector("details")?.open ?? (!one && rows.length <= 12);
  if (!runs.length) return place.replaceChildren();
  if (!rows.length) return place.replaceChildren(el("h2", {}, "The configurations are the same"));
  const head = el("tr", {}, ...["key", ...runs].map((name) => el("th", { scope: "col" }, name)));
  const body = el("tbody", {}, ...rows.map(([key, ...values]) => el("tr", {}, el("th", { scope: "row" }, key), ...values.map((value) => el("td", {}, value)))));
  const title = one ? "Configuration" : "Differences of configuration";
  place.replaceChildren(el("details", { open: wasOpen }, el("summary", {}, title), scrolling(el("table", {}, el("thead", {}, head), body), "Table of keys")));
}

// ---------------------------------------------------------------- the tools

function buildTools() {
  $("tools").onsubmit = (event) => event.preventDefault();
  for (const [name, label] of Object.entries(data.axes)) $("axis").append(new Option(label, name, false, name === state.axis));
  $("axis").onchange = (event) => { state.axis = event.target.value; setRange(0); };
  $("range").onchange = (event) => setRange(Number(event.target.value));
  const showWindow = () => { $("window").textContent = state.smoothing ? `${short(state.smoothing, 2)} steps` : "off"; };
  $("smoothing").oninput = (event) => { state.smoothing = WINDOWS[event.target.value] * lastStep(); showWindow(); drawSoon(); };
  $("smoothing").value = WINDOWS.findLastIndex((share) => share * lastStep() <= state.smoothing);
  showWindow();
  $("log-x").checked = state.logX;
  $("log-x").onchange = (event) => { state.logX = event.target.checked; draw(); };
  $("outliers").onchange = (event) => { state.outliers = event.target.checked; draw(); };
  $("metrics").oninput = $("names").oninput = filter;
  $("of-runs").hidden = data.runs.length === 1;
}

// The boxes that switch marks are their legend, too.
function buildEvents() {
  $("events").replaceChildren();
  for (const [kind, mark] of Object.entries(data.events)) {
    if (!data.runs.some((run) => run.events[kind].length)) continue;
    const box = el("input", { type: "checkbox", checked: state.events.has(kind) });
    box.onchange = () => { box.checked ? state.events.add(kind) : state.events.delete(kind); draw(); };
    const paint = data.runs.length > 1 ? css("ink") : dark.matches ? mark.dark_color : mark.color;
    $("events").append(el("label", {}, box, el("b", { ariaHidden: "true", style: `color: ${paint}` }, mark.glyph), kind));
  }
}

function build() {
  buildHeading();
  buildConfiguration();
  buildRuns();
  buildEvents();
  buildPanels();
  $("notes").replaceChildren(...data.notes.map((note) => el("li", {}, note)));
  filter();
  data.panels.forEach(linkZoom);
}

buildTools();
build();
dark.addEventListener("change", build);
let width = $("panels").clientWidth;
new ResizeObserver(() => {
  if ($("panels").clientWidth !== width) { width = $("panels").clientWidth; draw(); }
}).observe($("panels"));

// A served page reads its data again, and keeps what the reader chose.
if (document.querySelector("meta[http-equiv]").content.includes("connect-src")) {
  let seen = $("data").textContent;
  setInterval(async () => {
    const text = await fetch("data").then((answer) => (answer.ok ? answer.text() : seen), () => seen); // the run or the server may be gone
    if (text !== seen) { data = JSON.parse(text); build(); }
    seen = text;
  }, 5000);
}
