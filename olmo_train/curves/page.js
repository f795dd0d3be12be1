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

// ---------------------------------------------------------------- panels

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
const loss = (kind) => (v, run) => {
  const range = run.summary.ranges[kind]; // over the seeds
  if (v === null || !range) return v === null ? "–" : v.toFixed(4);
  return el("span", {}, v.toFixed(4), el("small", {}, range.map((end) => end.toFixed(4)).join(" to ")));
};
const COLUMNS = [
  ["run", (run) => run.name, (v) => v],
  ["state", (run) => run.state, (v) => v || "–"],
  ["training loss", (run) => run.summary.training, loss("training"), Math.min],
  ["validation loss", (run) => run.summary.validation, loss("validation"), Math.min],
  ["steps", (run) => run.summary.steps,
   (v, run) => v.toLocaleString("en") + (run.summary.total_steps > v ? ` of ${run.summary.total_steps.toLocaleString("en")}` : "")],
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
  if (data.panels.some((panel) => panel.curves.some((curve) => curve.odd)))
    $("events").append(el("span", {}, el("b", { ariaHidden: "true" }, "⊗"), " not finite"));
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
