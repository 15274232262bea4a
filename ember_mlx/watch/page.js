// Asks for the runs once a second and draws them. Whatever the runs hold is put in as text, never as HTML.
"use strict";

const EVERY = 1000; // milliseconds
const WIDTH = 420, HEIGHT = 230, LEFT = 58, RIGHT = 12, TOP = 8, BOTTOM = 34;
const DASHES = ["", "8 4", "8 3 2 3", "2 3", "10 2 2 2 2 2", "1 2", "14 5"];
const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text. */
function element(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A number for a reader: 1.20 GB, 12.3k, 3.4e-4. */
function say(value, unit = "") {
  const size = Math.abs(value);
  const large = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([least]) => size >= least);
  if (unit === "B") return large ? `${(value / large[0]).toPrecision(3)} ${large[1]}B` : `${value} B`;
  if (size >= 1e15 || (size && size < 1e-2)) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1e4) return `${+(value / large[0]).toPrecision(4)}${large[1]}`;
  return `${+value.toPrecision(4)}`;
}

/** Ticks at 1, 2 or 5 times a power of ten. */
function linearTicks(low, high, most) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

/** The powers of ten, or where there are fewer than two of them, ticks as on a linear axis; both as logarithms. */
function logTicks(low, high) {
  const whole = linearTicks(low, high, 6).filter(Number.isInteger);
  return whole.length > 1 ? whole : linearTicks(10 ** low, 10 ** high, 4).map(Math.log10);
}

/** The chart of one panel: a figure whose caption tells the values where the pointer or the arrow keys are. */
function chart(panel, runs) {
  const log = panel.scale === "log", onAxis = log ? Math.log10 : (value) => value;
  const ends = panel.key === "validation_loss" ? runs.map((run) => run.end) : runs.map(() => []);
  const points = runs.flatMap((run, i) => [...run.curves[panel.key], ...ends[i]]);
  const steps = points.map(([step]) => step), values = points.map(([, value]) => onAxis(value));
  const from = Math.min(...steps), to = Math.max(...steps, from + 1);
  let low = panel.scale === "from 0" ? Math.min(0, ...values) : Math.min(...values), high = Math.max(...values);
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  if (panel.scale !== "from 0") low -= room;
  high += room;
  const x = (step) => LEFT + ((step - from) / (to - from)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((onAxis(value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);

  const svg = element("svg:svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0 });
  svg.dataset.id = panel.key;
  for (const tick of log ? logTicks(low, high) : linearTicks(low, high, 4)) {
    const value = log ? 10 ** tick : tick, at = y(value);
    svg.append(element("svg:line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }));
    svg.append(element("svg:text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, say(value, panel.unit)));
  }
  for (const tick of linearTicks(from, to, 5).filter(Number.isInteger)) {
    svg.append(element("svg:text", { x: x(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, say(tick)));
  }
  svg.append(element("svg:text", { x: WIDTH - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, "step"));
  runs.forEach((run, i) => {
    const own = run.curves[panel.key], colour = `var(--line${i})`;
    const path = own.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    if (own.length === 1) svg.append(element("svg:circle", { cx: x(own[0][0]), cy: y(own[0][1]), r: 3, fill: colour }));
    svg.append(element("svg:polyline", { class: "curve", points: path, stroke: colour, "stroke-dasharray": DASHES[i] }));
    for (const [step, value] of ends[i]) {
      const star = element("svg:text", { class: "star", x: x(step), y: y(value) + 7, "text-anchor": "middle" }, "★");
      star.style.fill = colour;
      svg.append(star);
    }
  });
  const last = runs.filter((run) => run.curves[panel.key].length).map((run) => {
    const [step, value] = run.curves[panel.key].at(-1);
    return `${runs.length > 1 ? `${run.name}: ` : ""}${say(value, panel.unit)} at step ${step}`;
  });
  svg.setAttribute("aria-label", `${panel.title}: ${last.join("; ")}. Left and right arrows read other steps.`);
  const unit = panel.unit && panel.unit !== "B" ? `, ${panel.unit}` : "";
  const reading = element("span", { class: "reading", "aria-live": "polite" });
  addReading(svg, reading, [...new Set(steps)].sort((a, b) => a - b), x, (step) => {
    const there = runs.map((run) => run.curves[panel.key].find((point) => point[0] === step));
    return `step ${step}: ${there.map((point) => (point ? say(point[1], panel.unit) : "–")).join(" | ")}`;
  });
  const note = ends.some((end) => end.length) ? "★ after the last step, on the batches of the first validation" : "";
  return element("figure", {}, element("figcaption", {}, panel.title + unit, reading), svg, element("small", {}, note));
}

/** Let the pointer and the arrow keys choose a step, and tell what is there; a chart that is drawn anew tells it again. */
let read = null; // the chart and the step that are read
function addReading(svg, reading, steps, x, tell) {
  const line = element("svg:line", { class: "at", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(line);
  const show = (step) => {
    read = { chart: svg.dataset.id, step };
    line.setAttribute("x1", x(step));
    line.setAttribute("x2", x(step));
    line.setAttribute("visibility", "visible");
    reading.textContent = tell(step);
  };
  const hide = () => {
    read = null;
    line.setAttribute("visibility", "hidden");
    reading.textContent = "";
  };
  const follow = (event) => {
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * WIDTH;
    const distances = steps.map((step) => Math.abs(x(step) - at));
    show(steps[distances.indexOf(Math.min(...distances))]);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    const i = read ? steps.indexOf(read.step) + by : steps.length - 1;
    show(steps[Math.max(0, Math.min(steps.length - 1, i))]);
    event.preventDefault();
  });
  if (read?.chart === svg.dataset.id && steps.includes(read.step)) show(read.step);
}

function key(i) {
  const svg = element("svg:svg", { class: "key", viewBox: "0 0 40 12", "aria-hidden": "true" });
  const line = { x1: 0, x2: 40, y1: 6, y2: 6, stroke: `var(--line${i})`, "stroke-width": 3, "stroke-dasharray": DASHES[i] };
  svg.append(element("svg:line", line));
  return svg;
}

/** The newest values as a table, a column for each run. */
function latest(runs) {
  const row = (title, cells) =>
    element("tr", {}, element("th", { scope: "row" }, title), ...cells.map((text) => element("td", { class: "number" }, text)));
  const title = (panel) => panel.title + (panel.unit && panel.unit !== "B" ? `, ${panel.unit}` : "");
  const value = (run, panel) => (panel.key in run.latest ? say(run.latest[panel.key], panel.unit) : "–");
  const shown = PANELS.filter((panel) => runs.some((run) => panel.key in run.latest));
  const rows = [
    row("State", runs.map((run) => run.state)),
    row("Step", runs.map((run) => (run.iters ? `${run.step} of ${run.iters}` : `${run.step}`))),
    ...shown.map((panel) => row(title(panel), runs.map((run) => value(run, panel)))),
  ];
  const heads = runs.map((run, i) => element("th", { scope: "col", class: "number" }, key(i), run.name));
  const head = element("thead", {}, element("tr", {}, element("td"), ...heads));
  return [element("table", {}, head, element("tbody", {}, ...rows))];
}

function notices(runs) {
  const found = runs.filter((run) => !["running", "ended"].includes(run.state)).map((run) => `${run.name}: ${run.says}`);
  for (const run of runs.filter((each) => each.trouble)) found.push(`${run.path}: ${run.trouble}`);
  for (const run of runs.filter((each) => each.skipped_in_all)) {
    const more = run.skipped_in_all > run.skipped.length ? " and more" : "";
    found.push(`${run.path}: line ${run.skipped.join(", ")}${more} cannot be read, and is left out`);
  }
  return found.map((text) => element("p", { class: "notice" }, text));
}

function samples(runs) {
  const prompts = [...new Set(runs.flatMap((run) => run.samples.map((sample) => sample.prompt)))];
  return prompts.map((prompt) => {
    const article = element("article", {}, element("h3", { class: "said" }, prompt));
    runs.forEach((run, i) => {
      const [newest, ...older] = run.samples.find((sample) => sample.prompt === prompt)?.answers ?? [];
      if (!newest) return;
      const who = runs.length > 1 ? [key(i), `${run.name}, `] : [];
      article.append(element("div", { class: "who" }, ...who, `step ${newest[0]}`), element("p", { class: "said" }, newest[1]));
      if (!older.length) return;
      const before = older.flatMap(([step, answer]) =>
        [element("div", { class: "who" }, `step ${step}`), element("p", { class: "said" }, answer)]);
      const id = JSON.stringify([run.path, prompt]);
      article.append(element("details", { "data-id": id }, element("summary", {}, "Earlier answers"), ...before));
    });
    return article;
  });
}

function options(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.options)))];
  const differ = (name) => runs.some((run) => run.options[name] !== runs[0].options[name]);
  const ordered = [...names.filter(differ), ...names.filter((name) => !differ(name))];
  const row = (name, cells, differs) =>
    element("tr", differs ? { class: "differs" } : {}, element("th", { scope: "row" }, name),
      ...cells.map((text) => element("td", { class: "text" }, text ?? "")));
  const rows = ordered.map((name) => row(name, runs.map((run) => run.options[name]), differ(name)));
  const versions = runs.map((run) => Object.entries(run.versions).map((pair) => pair.join(" ")).join(", "));
  rows.push(row("versions", versions, false));
  const heads = runs.map((run, i) => element("th", { scope: "col" }, key(i), run.name));
  const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "option"), ...heads));
  const table = element("div", { class: "wide" }, element("table", {}, head, element("tbody", {}, ...rows)));
  const summary = runs.length > 1 ? "All options; those that differ come first" : "All options";
  return [element("details", { "data-id": "options" }, element("summary", {}, summary), table)];
}

/** Put the children in, if what they are made of has changed; what the reader has opened or reads stays so. */
const drawn = {};
function fill(id, content, make) {
  const text = JSON.stringify(content);
  if (drawn[id] === text) return;
  drawn[id] = text;
  const place = document.getElementById(id), children = make(), kept = read;
  const open = new Set([...place.querySelectorAll("details[open]")].map((each) => each.dataset.id));
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  place.replaceChildren(...children);
  for (const each of place.querySelectorAll("[data-id]")) {
    if (open.has(each.dataset.id)) each.open = true;
    if (focused !== null && each.dataset.id === focused) each.focus();
  }
  read = kept; // the old chart has lost the focus, and forgot it
  place.closest("section").hidden = !children.length && id !== "notices";
}

function draw({ runs }) {
  fill("latest", runs.map((run) => [run.name, run.state, run.step, run.iters, run.latest]), () => latest(runs));
  fill("notices", runs.map((run) => [run.name, run.says, run.trouble, run.skipped, run.skipped_in_all]), () => notices(runs));
  const panels = PANELS.filter((panel) => runs.some((run) => run.curves[panel.key].length));
  fill("curves", runs.map((run) => [run.name, run.curves, run.end]), () => panels.map((panel) => chart(panel, runs)));
  fill("samples", runs.map((run) => [run.name, run.samples]), () => samples(runs));
  const told = runs.filter((run) => Object.keys(run.options).length);
  fill("options", told.map((run) => [run.name, run.options, run.versions]), () => (told.length ? options(runs) : []));
}

let have = "", runsNow = null;
async function ask() {
  const connection = document.getElementById("connection");
  try {
    const answer = await fetch(`runs?have=${have}`, { signal: AbortSignal.timeout(10000) });
    if (answer.status === 200) {
      runsNow = await answer.json();
      have = answer.headers.get("ETag");
    }
    if (connection.textContent) connection.textContent = "";
  } catch {
    const text = "`ember-mlx watch` does not answer; this is what it said last. Start it again, and the page goes on.";
    if (connection.textContent !== text) connection.textContent = text;
  }
  if (runsNow) draw(runsNow);
  setTimeout(ask, EVERY);
}
ask();
