"use strict";
// The head of the page: summary, plots, settings; of several runs their table and what differs.

const CURVES = [["loss", "Loss"], ["l0", "L0"], ["fvu", "FVU"], ["dead", "Dead latents", percent]];
const share = (value) => (value === null || value === undefined ? "-" : value === 0 ? "0%" : percent(value));

function showOverview() {
  const one = facts.runs.length === 1 && about !== null;
  const run = facts.runs[0];
  document.getElementById("about").textContent = one
    ? [run.type, run.model, run.hook].filter(Boolean).join(" · ")
    : `${facts.runs.length} runs`;
  document.getElementById("foot").textContent = `sae-granary ${facts.version}`;
  if (one) showRun(run);
  else showComparison(facts.runs);
}

function showRun(run) {
  const rows = run.part ? ` (${run.part})` : "";
  const tiles = [
    ["latents", number(run.d_sae)], ["d_in", number(run.d_in)], ["k", run.k],
    ["FVU", run.fvu, `Fraction of variance unexplained${rows}; lower is better`],
    ["L0", run.l0, `Active latents per row${rows}`],
    ["dead", run.dead === null ? null : share(run.dead), "Latents that were silent at the end of training"],
    ["silent here", run.silent, "Latents that are active on no row of this cache"],
    ["CE score", run.ce_score], ["KL", run.kl],
    ["rows here", about.n_rows, "Rows of the cache that the statistics are over, special tokens left out"],
    ["training rows", run.rows], ["training time", run.time],
  ];
  for (const [name, value, title] of tiles) {
    if (value === null || value === undefined) continue;
    document.getElementById("tiles").append(el("div", {title}, el("dt", {}, name), el("dd", {}, typeof value === "number" ? number(value) : String(value))));
  }
  showNotes(run.notes);
  const plots = document.getElementById("plots");
  for (const [name, title, format] of CURVES) {
    if (run.curves[name]) plots.append(lineChart(title, [{name, x: run.curves[name][0], y: run.curves[name][1]}], {format}));
  }
  if (run.density) plots.append(histogram("Density of latents", run.density.edges, run.density.counts, {log: true, caption: run.silent ? `${number(run.silent)} silent` : ""}));
  const thresholds = run.thresholds;
  if (thresholds?.edges) plots.append(histogram("Thresholds", thresholds.edges, thresholds.counts, {log: true}));
  if (run.routing) plots.append(shares("Routing", Object.entries(run.routing)));
  if (run.settings.length) document.getElementById("settings").append(settingsOf("Settings", run));
  if (run.evaluation) document.getElementById("settings").prepend(evaluationOf(run.evaluation));
}

function showNotes(notes) {
  document.getElementById("notes").append(...notes.map((note) => el("p", {class: "note"}, note)));
}

function settingsOf(title, run) {
  const groups = run.settings.map(([section, values]) =>
    el("div", {}, el("h3", {}, section), el("dl", {}, ...values.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value || "-")]))));
  const more = run.thresholds?.shared !== undefined ? [el("p", {}, `One threshold for all latents: ${number(run.thresholds.shared)}`)] : [];
  return el("details", {}, el("summary", {}, title), ...more, el("div", {class: "settings"}, ...groups));
}

function evaluationOf(groups) {
  const parts = groups.map(([section, values]) =>
    el("div", {}, el("h3", {}, section), el("dl", {}, ...values.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, typeof value === "number" ? number(value, 4) : value)]))));
  return el("details", {open: ""}, el("summary", {}, "Evaluation"), el("div", {class: "settings"}, ...parts));
}

function showComparison(runs) {
  const plots = document.getElementById("plots");
  plots.className = "large";
  const points = runs.filter((run) => run.l0 !== null && run.fvu !== null).map((run) => ({name: run.name, group: run.type ?? "", x: run.l0, y: run.fvu}));
  if (points.length) plots.append(scatter("Pareto", points, "L0", "FVU"));
  for (const [name, title, format] of CURVES) {
    const series = runs.filter((run) => run.curves[name]).map((run) => ({name: run.name, x: run.curves[name][0], y: run.curves[name][1]}));
    if (!series.length) continue;
    const chart = lineChart(title, series, {height: 240, format});
    if (series.length <= 8) chart.append(legend(series.map((s) => s.name)));
    plots.append(chart);
  }
  const host = document.getElementById("runs");
  host.hidden = false;
  host.append(el("div", {class: "scroll"}, runsTable(runs)));
  const differing = differences(runs);
  if (differing) document.getElementById("settings").append(differing);
  document.getElementById("settings").append(...runs.filter((run) => run.settings.length).map((run) => settingsOf(run.name, run)));
  showNotes(facts.notes);
  for (const run of runs) showNotes(run.notes.map((note) => `${run.name}: ${note}`));
}

const RUN_COLUMNS = [
  ["name", "run"], ["type", "type"], ["hook", "hook"], ["d_sae", "latents", number], ["k", "k"], ["l0", "L0", number],
  ["fvu", "FVU", (value) => number(value, 4)], ["ce_score", "CE score", (value) => number(value, 4)], ["kl", "KL", number],
  ["dead", "dead", share], ["rows", "rows"], ["time", "time"],
];

function runsTable(runs) {
  const columns = RUN_COLUMNS.filter(([key]) => runs.some((run) => run[key] !== null && run[key] !== undefined && run[key] !== ""));
  const body = el("tbody");
  let sorted = "", descending = false;
  const fill = (order) => body.replaceChildren(...order.map((run) => el("tr", {}, ...columns.map(([key, , format]) => {
    const text = run[key] === null || run[key] === undefined ? "" : (format ?? String)(run[key]);
    return el("td", {}, key === "name" && run.link ? el("a", {href: run.link}, text) : text);
  }))));
  const sort = (key) => {
    descending = sorted === key && !descending;
    sorted = key;
    const compare = (a, b) => (a ?? "") < (b ?? "") ? -1 : (a ?? "") > (b ?? "") ? 1 : 0;
    fill([...runs].sort((a, b) => compare(a[key], b[key]) * (descending ? -1 : 1)));
  };
  fill(runs);
  return el("table", {}, el("thead", {}, el("tr", {}, ...columns.map(([key, title]) => el("th", {}, el("button", {type: "button", click: () => sort(key)}, title))))), body);
}

function differences(runs) {
  const flat = runs.map((run) => new Map(run.settings.flatMap(([section, values]) => values.map(([name, value]) => [`${section}.${name}`, value]))));
  const names = [...new Set(flat.flatMap((settings) => [...settings.keys()]))];
  const differing = names.filter((name) => !["run.name", "run.runs_dir"].includes(name) && new Set(flat.map((settings) => settings.get(name))).size > 1);
  if (!differing.length) return null;
  const head = el("tr", {}, el("th", {}, "setting"), ...runs.map((run) => el("th", {}, run.name)));
  const rows = differing.map((name) => el("tr", {}, el("td", {}, name), ...flat.map((settings) => el("td", {}, settings.get(name) ?? ""))));
  return el("details", {open: ""}, el("summary", {}, "Settings that differ"), el("div", {class: "scroll"}, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))));
}
