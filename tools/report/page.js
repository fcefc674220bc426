// The moving parts of the page of `mls report`: curves (uPlot), the gallery, judging. All data are in #data; without this
// script the page still says all that is said in words.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const one = (selector, of = document) => of.querySelector(selector);
const all = (selector, of = document) => [...of.querySelectorAll(selector)];
const several = data.runs.length > 1;
const names = data.memories;
all(".scripted").forEach(part => { part.hidden = false; });

// ------------------------------------------------------------------------------------------------------ the curves
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const DASHES = [[], [8, 4], [3, 3], [10, 3, 2, 3]], CHANCE = [2, 3], HEIGHT = 190;
const REFERENCES = ["chance", "untrained"];
const short = value => value === 0 ? "0" : Math.abs(value) >= 1e6 ? +(value / 1e6).toPrecision(4) + "M"
  : Math.abs(value) >= 1e4 ? +(value / 1e3).toPrecision(4) + "k" : Math.abs(value) < 1e-3 ? value.toExponential(1)
  : String(+value.toPrecision(4));
const plots = new Map();
let axis = "step";

function lines(chart) {
  const found = [];
  data.charts.runs.forEach((curves, run) => Object.entries(chart.curves).forEach(([label, metric], kind) => {
    if (curves[metric]) found.push({run, kind, label, ...curves[metric]});
  }));
  return found.filter(line => data.charts.xs[line.x][axis]);
}

function range(chart) {
  return (plot, low, high) => {
    if (low == null) return [0, 1];
    if (chart.low != null) low = Math.min(low, chart.low);
    if (chart.high != null) high = Math.max(high, chart.high);
    const span = Math.max(chart.span, 1e-3 * Math.abs(high), 1e-9), missing = Math.max(0, span - (high - low)) / 2;
    const room = 0.05 * Math.max(span, high - low);
    return [low === chart.low ? low : low - missing - room, high === chart.high ? high : high + missing + room];
  };
}

function atStep(run, step) { // where a step lies on the axis that is shown
  const x = data.charts.xs[Object.values(data.charts.runs[run])[0].x];
  if (!x || !x[axis]) return null;
  let place = x.step.findIndex(value => value >= step);
  if (place < 0) place = x.step.length - 1;
  const before = Math.max(0, place - 1), width = x.step[place] - x.step[before];
  const share = width ? Math.min(1, Math.max(0, (step - x.step[before]) / width)) : 1;
  return x[axis][before] + share * (x[axis][place] - x[axis][before]);
}

function marks(plot) {
  const {ctx, bbox} = plot;
  ctx.save();
  ctx.setLineDash([2, 4]);
  data.runs.forEach((run, number) => {
    if (!one(`input[name=run][value="${number}"]`).checked || !Object.keys(data.charts.runs[number]).length) return;
    ctx.strokeStyle = several ? colour("c" + number % 8) : colour("soft");
    run.marks.forEach(mark => {
      const at = atStep(number, mark.step), x = at == null ? NaN : plot.valToPos(at, "x", true);
      if (!(x >= bbox.left && x <= bbox.left + bbox.width)) return;
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
    });
  });
  ctx.restore();
}

function readout(chart, shown, figure) {
  return plot => {
    const index = plot.cursor.idx, outputs = all("output", figure);
    Object.keys(chart.curves).forEach((label, kind) => {
      const values = shown.map((line, n) => line.kind === kind && plot.series[n + 1].show && index != null
        ? near(plot.data[n + 1], index) : null).filter(value => value != null);
      outputs[kind].textContent = values.map(short).join(" · ");
    });
  };
}

function near(values, index) { // the last value at or before a place that this curve need not have
  for (; index >= 0; index--) if (values[index] !== undefined) return values[index];
  return null;
}

function draw(place) {
  const chart = Object.values(data.charts.sections).flat().find(each => each.id === place.dataset.chart);
  const shown = lines(chart);
  const points = shown.length ? uPlot.join(shown.map(line => [data.charts.xs[line.x][axis], line.y])) : [];
  if (chart.log) for (const values of points.slice(1)) values.forEach((value, n) => { if (value <= 0) values[n] = null; });
  const series = shown.map(line => ({
    label: line.label, width: line.run === 0 && several ? 3 : 1.8, show: one(`input[name=run][value="${line.run}"]`).checked,
    stroke: several ? colour("c" + line.run % 8) : REFERENCES.includes(line.label) ? colour("soft") : colour("c" + line.kind),
    dash: REFERENCES.includes(line.label) ? CHANCE : several ? DASHES[line.kind % 4] : [],
    points: {show: line.y.length <= 12, size: 5},
  }));
  plot(place, chart, shown, points, series, axis, {sync: {key: "mls", scales: ["x", null]}}, [marks]);
}

function drawScores(place) { // which share of the rows lies below which score, of one run
  const chart = {curves: data.runs[place.dataset.scores].scores, span: 0, low: 0, high: 100};
  const shown = Object.entries(chart.curves).map(([label, curve], kind) => ({label, kind, ...curve}));
  const series = shown.map(line => ({label: line.label, width: 2, stroke: colour("c" + (line.kind >> 1)),
    dash: line.kind % 2 ? [] : CHANCE, points: {show: false}}));
  plot(place, chart, shown, uPlot.join(shown.map(line => [line.x, line.y])), series, "cosine", {}, []);
}

function plot(place, chart, shown, points, series, xLabel, cursor, draw) {
  plots.get(place)?.destroy();
  plots.delete(place);
  if (!shown.length) return;
  const text = {stroke: colour("soft"), font: "11px system-ui, sans-serif", grid: {stroke: colour("rule"), width: 1},
    ticks: {stroke: colour("rule"), width: 1}};
  plots.set(place, new uPlot({
    width: Math.max(200, place.clientWidth), height: HEIGHT, legend: {show: false},
    scales: {x: {time: false}, y: chart.log ? {distr: 3} : {range: range(chart)}},
    series: [{label: xLabel}, ...series],
    axes: [{...text, size: 38, label: xLabel, labelSize: 14, labelGap: 0, labelFont: text.font, space: 60, values: (_, ticks) => ticks.map(short)},
      {...text, size: 52, values: (_, ticks) => ticks.map(tick => tick == null ? "" : short(tick))}],
    cursor: {...cursor, drag: {x: true, y: false}, y: false, points: {size: 7}},
    hooks: {draw, setCursor: [readout(chart, shown, place.closest("figure"))]},
  }, points, place));
}

const places = all(".plot"), redraw = () => places.forEach(place => (place.dataset.scores ? drawScores : draw)(place));
if (places.length) {
  const had = name => data.charts.xs.some(x => x[name]);
  all("input[name=x]").forEach(input => {
    input.closest("label").hidden = !had(input.value);
    input.addEventListener("change", () => { axis = input.value; redraw(); });
  });
  all("input[name=run]").forEach(input => input.addEventListener("change", redraw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  redraw();
}

// ------------------------------------------------------------------------------------------------------ the gallery
const SVG = "http://www.w3.org/2000/svg";
const svg = (name, attributes) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const placeOf = (source, id) => data.places[source + ":" + id];

function crop(source, id, box, css = "") {
  const place = placeOf(source, id);
  if (!place) {
    const none = document.createElement("span");
    none.className = "crop none " + css;
    none.textContent = "not shown";
    return none;
  }
  const [sheet, x, y, w, h] = place, tiny = data.tiny ? " tiny" : "";
  const part = [x + box[0] * w, y + box[1] * h, Math.max(1e-3, box[2] - box[0]) * w, Math.max(1e-3, box[3] - box[1]) * h];
  const made = svg("svg", {class: "crop " + css + tiny, viewBox: part.join(" "), preserveAspectRatio: "none", "aria-hidden": "true"});
  made.append(svg("use", {href: "#sheet" + sheet}));
  return made;
}

function whole(source, id, boxes) { // the crop red, the region that is most like the other's yellow
  const [sheet, x, y, w, h] = placeOf(source, id);
  const made = svg("svg", {viewBox: `${x} ${y} ${w} ${h}`, "aria-hidden": "true"});
  made.append(svg("use", {href: "#sheet" + sheet}));
  boxes.forEach((box, n) => {
    const rect = {x: x + box[0] * w, y: y + box[1] * h, width: (box[2] - box[0]) * w, height: (box[3] - box[1]) * h};
    made.append(svg("rect", {...rect, class: "box"}), svg("rect", {...rect, class: n ? "box region" : "box place"}));
  });
  return made;
}

const dialog = one("#whole");
one("button", dialog).addEventListener("click", () => dialog.close());
function open(source, query, match) {
  all("figure", dialog).forEach((figure, side) => {
    const [id, box, age, score] = side ? match : [query[0], query[1]], regions = match[6];
    const boxes = regions ? [box, regions[side]] : [box];
    one("div", figure).replaceChildren(placeOf(source, id) ? whole(source, id, boxes) : "not shown");
    const facts = [side ? "match" : "query", data.names[source + ":" + id] || "image " + id];
    if (age != null) facts.push(`the row is ${age} steps old`);
    if (score != null) facts.push(`${regions ? "score" : "cosine"} ${score}`);
    if (regions) facts.push("red: the crop, yellow: the region that is most like the other’s");
    one("figcaption", figure).textContent = facts.join("; ");
  });
  dialog.showModal();
}

const chosen = name => one(`#gallery input[name=${name}]:checked`)?.value;
const gallery = {all: false};

function matchItem(source, query, match) {
  const item = one("#match").content.cloneNode(true).firstElementChild, [id, box, age, score, percentile, shared] = match;
  one(".crop", item).replaceWith(crop(source, id, box));
  const words = percentile != null ? percentile.toFixed(1) : score != null ? "cos " + score.toFixed(2) : "";
  one(".words", item).textContent = words + (percentile != null ? " %" : "") + (shared ? " ✓" : "");
  one(".unseen", item).textContent = ` match: image ${id}` + (shared ? ", shares a label" : "");
  one("button", item).addEventListener("click", () => open(source, query, match));
  return item;
}

function list(title, source, query, matches) {
  const made = document.createElement("div"), heading = document.createElement("p"), items = document.createElement("ol");
  made.className = "list"; items.className = "matches"; heading.textContent = title;
  items.append(...matches.map(match => matchItem(source, query, match)));
  made.append(heading, items);
  return made;
}

function listsOf(run, number, moment) { // [title, source, matches] of what is shown of one query
  const show = chosen("show"), sides = show === "runs" ? ["left", "right"].map(side => +one(`select[name=${side}]`).value) : [run];
  return sides.flatMap(side => {
    const of = data.runs[side], shown = of.shown[Math.min(moment, of.shown.length - 1)], query = shown?.queries[number];
    if (!query) return [];
    const memories = Object.keys(query[3]).filter(name => name !== "pixels");
    const wanted = {projection: ["projections"], both: memories, pixels: [memories[0], "pixels"]}[show] || [memories[0]];
    const found = wanted.filter(name => query[3][name]);
    return (found.length ? found : memories.slice(0, 1)).map(name =>
      [(show === "runs" ? of.label + ": " : "") + (names[name] || name), of.source, query, query[3][name]]);
  });
}

function redrawGallery() {
  const left = one("select[name=left]"), run = left ? +left.value : data.runs.findIndex(each => each.shown.length);
  const shown = data.runs[run].shown, slider = one("input[name=moment]"), box = one("#queries");
  if (!shown.length) return box.replaceChildren("This run has no crops to show.");
  slider.max = shown.length - 1;
  const moment = Math.min(+slider.value, shown.length - 1), last = shown.at(-1).queries, numbers = last.map((_, n) => n);
  if (chosen("order") !== "random") numbers.sort((a, b) => last[a][2] - last[b][2] || a - b);
  if (chosen("order") === "best") numbers.reverse();
  const when = shown[moment], count = gallery.all ? numbers.length : Math.min(data.shown, numbers.length);
  one("output[name=when]").textContent = `step ${when.step.toLocaleString("en")}, epoch ${when.epoch}`;
  slider.setAttribute("aria-valuetext", one("output[name=when]").textContent);
  box.replaceChildren(...numbers.slice(0, count).filter(number => when.queries[number]).map(number => {
    const query = when.queries[number], source = data.runs[run].source;
    const row = document.createElement("article"), asked = document.createElement("button"), words = document.createElement("span");
    row.className = "query"; asked.className = "asked"; asked.type = "button"; words.className = "words";
    words.textContent = `${Math.round(100 * query[2])} % agree`;
    const unseen = document.createElement("span"), lists = document.createElement("div");
    unseen.className = "unseen"; unseen.textContent = ` query: image ${query[0]}`;
    asked.append(crop(source, query[0], query[1], "red"), words, unseen);
    lists.className = "lists";
    const found = listsOf(run, number, moment);
    lists.append(...found.map(([title, of, own, matches]) => list(title, of, own, matches)));
    asked.addEventListener("click", () => open(source, query, found[0][3][0]));
    row.append(asked, lists);
    return row;
  }));
  one("#meaning").textContent = `Matches of ${data.runs[run].label} at step ${when.step.toLocaleString("en")}; ${count} of ${numbers.length} queries.`;
  one("#more").textContent = gallery.all ? `Show ${Math.min(data.shown, numbers.length)}` : `Show all ${numbers.length}`;
  one("#more").parentElement.hidden = numbers.length <= data.shown;
}

if (one("#queries")) {
  const slider = one("input[name=moment]"), most = Math.max(...data.runs.map(run => run.shown.length));
  slider.max = most - 1;
  slider.value = most - 1;
  slider.addEventListener("input", redrawGallery);
  all("#gallery input[type=radio], #gallery select").forEach(input => input.addEventListener("change", redrawGallery));
  one("#more").addEventListener("click", () => { gallery.all = !gallery.all; redrawGallery(); });
  redrawGallery();
}

// ------------------------------------------------------------------------------------------------------ judging
const begin = one("#begin"), judging = one("#judging");
const judged = {run: 0, answers: [], running: false};

function ask() {
  const run = data.runs[judged.run], number = judged.answers.length, pair = run.pairs[number];
  judging.hidden = !pair;
  judged.running = Boolean(pair);
  if (!pair) return save(run);
  one("#asked").textContent = `Pair ${number + 1} of ${run.pairs.length}: do both show the same kind of thing?`;
  all(".pair > div", judging).forEach((side, n) => side.replaceChildren(crop(run.source, pair[1 + 2 * n], pair[2 + 2 * n])));
}

function answer(key) {
  judged.answers.push(key);
  ask();
}

function save(run) {
  const pairs = run.pairs.map(([kind, query, queryBox, other, otherBox], n) =>
    ({kind, query: [query, queryBox], other: [other, otherBox], answer: judged.answers[n]}));
  const text = JSON.stringify({judged: 1, run: run.label, step: run.shown.at(-1).step, pairs});
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "judged.json";
  link.click();
  one("#answered").textContent = "All pairs are judged: judged.json is saved.";
  begin.textContent = "Begin again";
}

if (begin) {
  begin.addEventListener("click", () => {
    judged.run = +(one("select[name=judged-run]")?.value ?? data.runs.findIndex(run => run.pairs.length));
    judged.answers = [];
    one("#answered").textContent = "";
    ask();
    one("button", judging).focus();
  });
  all("button", judging).forEach(button => button.addEventListener("click", () => answer(button.value)));
  addEventListener("keydown", event => {
    if (!judged.running || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (["y", "n", "?"].includes(event.key)) { event.preventDefault(); answer(event.key); }
  });
}
})();
