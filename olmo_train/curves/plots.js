// What plotly draws in a panel: values on the chosen axes, traces, ranges and ticks. All functions read `data` and `state` of page.js.

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
  const { color, dash } = look(panel, curve), evaluation = isEvaluation(curve), run = data.runs[curve.run].name;
  const label = data.runs.length === 1 ? curve.name : panel.curves.some((c) => c.name !== curve.name) ? `${run} · ${curve.name}` : run;
  const smoothed = state.smoothing > 0 && panel.smooth && !evaluation;
  const points = smoothed ? curve.mean ?? curve : curve;
  const at = (values) => (smoothed ? smooth(points.step, values, state.smoothing) : values);
  const base = { type: "scatter", yaxis: "y", name: label, x: onAxis(curve.run, points.step), y: at(points.value), mode: "lines",
                 line: { color, dash, width: smoothed || evaluation ? 2 : 1.5 } };
  if (curve.step.length === 1 || (evaluation && curve.step.length <= 100)) Object.assign(base, { mode: "lines+markers", marker: { color, size: 5 } });
  if (curve.low) return [...bandTraces(base, at(points.low), at(points.high)), ...oddTrace(curve, label, color)];
  const raw = { ...base, x: onAxis(curve.run, curve.step), y: curve.value, opacity: 0.28, hoverinfo: "skip", line: { color, width: 1 } };
  return [...(smoothed ? [raw] : []), base, ...oddTrace(curve, label, color)];
}

// A mean over seeds, in a band from the lowest to the highest of them.
function bandTraces(mean, low, high) {
  const edge = { ...mean, mode: "lines", hoverinfo: "skip", line: { width: 0 } };
  const ends = low.map((value, i) => [value, high[i]]);
  return [{ ...mean, customdata: ends, hovertemplate: "%{y} (%{customdata[0]:.6~g} to %{customdata[1]:.6~g})" },
          { ...edge, y: low }, { ...edge, y: high, fill: "tonexty", fillcolor: mean.line.color + "30" }];
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
  return { nticks: 7, exponentformat: "SI", minexponent: 4, tickformat: Math.abs(high) < 0.01 ? "~g" : undefined };
}

function limitLines(panel) {
  const values = [...new Set(panel.limits.filter((l) => !isHidden(l.run)).map((l) => l.value))];
  return {
    shapes: values.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, yref: "y", y0: y, y1: y, line: { color: css("soft"), width: 1, dash: "dot" } })),
    annotations: values.map((y) => ({ text: `${panel.limit_name} ${y}`, xref: "paper", x: 1, xanchor: "left", yref: "y", y: panel.log ? Math.log10(y) : y,
                                      showarrow: false, font: { size: 11, color: css("soft") } })),
  };
}

// Between two steps there is none, so a short range needs no fractions.
function wholeSteps() {
  const [low, high] = xRange();
  return state.axis === "step" && high - low < 8 ? 1 : undefined;
}
