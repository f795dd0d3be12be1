"use strict";
// Draws the data that page.py wrote. Everything follows from `state`: a control changes it and calls draw().

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches; // there a drag scrolls the page, so it must not zoom
const lastStep = Math.max(...data.runs.map((run) => run.summary.steps));
const WINDOWS = [0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2]; // smoothing, as shares of the longest run

const state = {
  axis: data.look.axis,
  logX: data.look.log_x,
  smoothing: data.look.smooth, // steps
  outliers: false,
  range: null, // [from, to] on the x axis; null is the whole run
  hidden: new Set(), // runs
  events: new Set(Object.keys(data.events).filter((kind) => data.events[kind].shown)),
};

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

const color = (i) => { const c = data.colors[dark.matches ? "dark" : "light"]; return c[i % c.length]; };
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

// With one run, colour marks the curve; with several, colour marks the run and the dash marks the curve.
function look(panel, curve) {
  const names = [...new Set(panel.curves.map((c) => c.name))];
  const index = names.indexOf(curve.name);
  if (data.runs.length === 1) return { color: color(index), dash: data.dashes[Math.floor(index / data.colors.light.length) % data.dashes.length] };
  return { color: color(curve.run), dash: data.dashes[index % data.dashes.length] };
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
  return [{ type: "scatter", yaxis: "y2", mode: "markers", name: label, x: onAxis(curve.run, steps), y: steps.map(() => 0.97), text,
            hovertemplate: "%{text}", marker: { color, size: 9, symbol: "circle-x-open" } }];
}

// Events stand on a second y axis from 0 to 1, so that they keep their place whatever the curves do.
function eventTraces() {
  const traces = [];
  data.runs.forEach((run, i) => {
    if (state.hidden.has(i)) return;
    for (const kind of state.events) {
      const events = run.events[kind];
      if (!events.length) continue;
      const x = onAxis(i, events.map((e) => e.step));
      const text = events.map((e) => `${kind} at step ${e.step}` + (e.text ? `<br>${e.text}` : ""));
      const name = data.runs.length > 1 ? run.name : "";
      const common = { type: "scatter", yaxis: "y2", hovertemplate: `%{text}<extra>${name}</extra>`, showlegend: false };
      const paint = data.runs.length > 1 ? color(i) : { spike: color(1), skip: color(3) }[kind] ?? css("soft");
      if (data.events[kind].mark === "line") {
        traces.push({ ...common, mode: "lines", x: x.flatMap((v) => [v, v, null]), y: x.flatMap(() => [0, 1, null]), text: text.flatMap((t) => [t, t, ""]),
                      line: { color: paint, width: 1, dash: { resume: "dash", signal: "dashdot" }[kind] ?? "dot" }, opacity: 0.75 });
      } else {
        traces.push({ ...common, mode: "markers", x, y: x.map(() => (kind === "skip" ? 0.03 : 0.97)), text,
                      marker: { color: paint, size: 8, symbol: kind === "skip" ? "x" : "triangle-down", line: { width: 0 } } });
      }
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
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 0.5;
  return [low - pad, high + pad];
}

function xRange() {
  const range = state.range ?? wholeRange();
  return state.logX ? range.map((v) => Math.log10(Math.max(v, wholeRange(true)[0]))) : range;
}

function wholeRange(positive = false) {
  const steps = data.panels.flatMap((panel) => panel.curves.filter((c) => !state.hidden.has(c.run)).map((c) => {
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
    margin: { l: 48, r: 10, t: 8, b: 36 }, width: panel.plot.clientWidth, height: panel.plot.clientHeight, showlegend: false, hovermode: "x unified", dragmode: touch ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    hoverlabel: { bgcolor: css("paper"), bordercolor: css("line"), font: { color: css("ink"), size: 12 }, namelength: -1 },
    xaxis: { ...axis, type: state.logX ? "log" : "linear", range: xRange(), ...(state.logX ? logTicks(...xRange()) : { exponentformat: exponent, nticks: 8, dtick: wholeSteps() }),
             title: { text: data.axes[state.axis], font: { color: css("soft"), size: 12 }, standoff: 6 }, showline: true,
             hoverformat: state.axis === "step" ? ",d" : ".4s" },
    yaxis: { ...axis, type: panel.log ? "log" : "linear", range: panel.zoom ?? fitY(panel, traces), hoverformat: ".6~g", ...yTicks(panel, traces) },
    yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false },
    shapes: limitShapes(panel),
  };
}

// 1, 2, 5 on a log axis of up to three decades, on a longer one the powers of ten. `low` and `high` are logarithms.
function logTicks(low, high) {
  const span = high - low;
  if (span < 0.4) return { nticks: 6 };
  const digits = span < 0.8 ? [1, 2, 3, 4, 5, 6, 7, 8, 9] : span < 3 ? [1, 2, 5] : [1];
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
  return { nticks: 7, exponentformat: Math.abs(high) < 0.01 ? "power" : "SI", minexponent: Math.abs(high) < 0.01 ? 2 : 4 };
}

function limitShapes(panel) {
  const values = [...new Set(panel.limits.filter((l) => !state.hidden.has(l.run)).map((l) => l.value))];
  return values.map((value) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, yref: "y", y0: value, y1: value, line: { color: css("soft"), width: 1, dash: "dot" },
    label: { text: `${panel.limit_name} ${value}`, textposition: "end", font: { size: 11, color: css("soft") } },
  }));
}

function draw(only) {
  for (const panel of only ? [only] : data.panels) {
    const curves = panel.curves.filter((c) => !state.hidden.has(c.run)).flatMap((curve) => curveTraces(panel, curve));
    Plotly.react(panel.plot, [...curves, ...eventTraces()], layout(panel, curves), { displayModeBar: false, doubleClick: false });
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
  if (names.size < 2) return;
  for (const [name, curve] of names) {
    const { color, dash } = look(panel, curve);
    const stroke = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 4", longdashdot: "10 3 2 3" }[dash];
    const item = document.createElement("li");
    item.innerHTML = `<svg viewBox="0 0 22 8"><line x1="0" y1="4" x2="22" y2="4" stroke-width="2" stroke-dasharray="${stroke}"/></svg>`;
    item.querySelector("line").setAttribute("stroke", data.runs.length > 1 ? css("soft") : color);
    item.append(name);
    panel.legend.append(item);
  }
}

function buildPanel(panel, i) {
  const section = document.createElement("section");
  section.className = i === 0 ? "panel first" : "panel";
  section.innerHTML = `<header><h2></h2><span class="unit"></span><label><input type="checkbox"> log y</label></header><ul class="legend"></ul><div class="plot"></div>`;
  section.querySelector("h2").textContent = panel.title;
  section.querySelector(".unit").textContent = panel.unit;
  panel.plot = section.querySelector(".plot");
  panel.legend = section.querySelector(".legend");
  const box = section.querySelector("input");
  box.checked = panel.log;
  box.onchange = () => { panel.log = box.checked; panel.zoom = null; draw(panel); };
  $("panels").append(section);
}

// A zoom in x is every panel's; y then fits what is in sight, except where the reader drew a box of his own.
function linkZoom(panel) {
  panel.plot.on("plotly_relayout", (change) => {
    if (change["xaxis.range[0]"] === undefined && change["yaxis.range[0]"] === undefined) return;
    if (change["yaxis.range[0]"] !== undefined) panel.zoom = [change["yaxis.range[0]"], change["yaxis.range[1]"]];
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
  data.panels.forEach((panel) => { panel.zoom = null; });
  state.range = null;
  if (share > 0) { const [low, high] = wholeRange(); state.range = [low + share * (high - low), high]; }
  $("range").value = String(share);
  draw();
}

// ---------------------------------------------------------------- the tables

function row(cells, tag = "td", numberFrom = 1) {
  const line = document.createElement("tr");
  cells.forEach((cell, i) => {
    const element = document.createElement(tag);
    if (i >= numberFrom) element.className = "number";
    element.append(cell);
    line.append(element);
  });
  return line;
}

function buildRuns() {
  const table = $("runs").querySelector("table");
  table.createTHead().append(row(["run", "training loss", "validation loss", "steps", "tokens", "time", "tokens/s", "events"], "th"));
  const body = table.createTBody();
  data.runs.forEach((run, i) => {
    const s = run.summary;
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
    label.append(box, run.name);
    const events = Object.entries(s.events).map(([kind, n]) => `${n} ${kind}${n > 1 ? "s" : ""}`).join(", ") || "–";
    const number = (v) => (v === null ? "–" : v.toFixed(4));
    const line = row([label, number(s.training), number(s.validation), s.steps.toLocaleString("en"), short(s.tokens), duration(s.seconds), short(s.speed), events]);
    box.onchange = () => { box.checked ? state.hidden.delete(i) : state.hidden.add(i); line.classList.toggle("off", !box.checked); draw(); };
    run.box = box;
    run.label = label;
    if (data.runs.length === 1) box.hidden = true;
    body.append(line);
  });
}

function paintRuns() {
  if (data.runs.length > 1) data.runs.forEach((run, i) => { run.box.style.accentColor = color(i); run.label.style.color = color(i); });
}

function buildConfiguration() {
  const { runs, rows } = data.differences;
  const place = $("configuration");
  if (!runs.length) { place.remove(); return; }
  const table = document.createElement("table");
  table.createTHead().append(row(["key", ...runs], "th", 99));
  const body = table.createTBody();
  rows.forEach((cells) => body.append(row(cells, "td", 99)));
  const scroll = Object.assign(document.createElement("div"), { className: "scroll" });
  scroll.append(table);
  if (runs.length === 1) {
    const details = document.createElement("details");
    details.append(Object.assign(document.createElement("summary"), { textContent: "Configuration" }), scroll);
    place.append(details);
  } else {
    const title = rows.length ? "Differences of configuration" : "The configurations are the same";
    place.append(Object.assign(document.createElement("h2"), { textContent: title }));
    if (rows.length) place.append(scroll);
  }
}

// ---------------------------------------------------------------- the tools

function buildTools() {
  $("tools").onsubmit = (event) => event.preventDefault();
  for (const [name, label] of Object.entries(data.axes)) $("axis").append(new Option(label, name, false, name === state.axis));
  $("axis").onchange = (event) => { state.axis = event.target.value; setRange(0); };
  $("range").onchange = (event) => setRange(Number(event.target.value));
  const showWindow = () => { $("window").textContent = state.smoothing ? `${short(state.smoothing, 2)} steps` : "off"; };
  $("smoothing").oninput = (event) => { state.smoothing = WINDOWS[event.target.value] * lastStep; showWindow(); drawSoon(); };
  $("smoothing").value = WINDOWS.findLastIndex((share) => share * lastStep <= state.smoothing);
  showWindow();
  $("log-x").checked = state.logX;
  $("log-x").onchange = (event) => { state.logX = event.target.checked; draw(); };
  $("outliers").onchange = (event) => { state.outliers = event.target.checked; draw(); };
  for (const kind of Object.keys(data.events)) {
    const count = data.runs.reduce((sum, run) => sum + run.events[kind].length, 0);
    if (!count) continue;
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: state.events.has(kind) });
    box.onchange = () => { box.checked ? state.events.add(kind) : state.events.delete(kind); draw(); };
    label.append(box, kind);
    $("events").append(label);
  }
}

buildRuns();
buildTools();
data.panels.forEach(buildPanel);
buildConfiguration();
data.notes.forEach((note) => $("notes").append(Object.assign(document.createElement("li"), { textContent: note })));
paintRuns();
draw();
data.panels.forEach(linkZoom);
dark.addEventListener("change", () => { paintRuns(); draw(); });
let width = $("panels").clientWidth;
new ResizeObserver(() => {
  if ($("panels").clientWidth !== width) { width = $("panels").clientWidth; draw(); }
}).observe($("panels"));
