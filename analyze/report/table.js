"use strict";
// The table of latents: searched, sorted, and drawn only where it is seen.

const COLUMNS = [["number", "latent"], ["label", "top tokens"], ["density", "density"], ["mean", "mean"], ["largest", "max"]];
const FILTERS = [
  ["active", "active", (i) => overview.density[i] > 0],
  ["all", "all latents", () => true],
  ["silent", "silent", (i) => overview.density[i] === 0],
  ["rare", "under 0.01%", (i) => overview.density[i] > 0 && overview.density[i] < 1e-4],
  ["dense", "over 10%", (i) => overview.density[i] > 0.1],
];
const N_LABELS = 3;
let overview, words, lowered, order = [], cursor = 0, opened = -1, sorting = {key: "largest", descending: true};

const grid = document.getElementById("grid"), space = document.getElementById("space"), search = document.getElementById("search");
const rowHeight = () => (matchMedia("(max-width: 820px)").matches ? 34 : 27);

function labelsOf(latent) {
  const found = [];
  for (let i = 0; i < N_LABELS; i++) {
    const place = overview.labels[latent * N_LABELS + i];
    if (place) found.push(words[place - 1].trim() || "\u2423");
  }
  return found;
}

async function startTable() {
  [overview, words] = await Promise.all([arrays("overview"), json("words")]);
  lowered = words.map((word) => word.trim().toLowerCase());
  search.placeholder = about.texts === "none" ? "Number" : about.texts === "text" ? "Text or number" : "Token or number";
  const which = document.getElementById("which");
  which.append(...FILTERS.map(([key, title]) => el("option", {value: key}, title)));
  const columns = document.getElementById("columns");
  columns.append(...COLUMNS.map(([key, title]) => el("div", {role: "columnheader", "data-key": key},
    el("button", {type: "button", click: () => sortBy(key)}, key === "label" && about.texts === "text" ? "strongest text" : title))));
  search.addEventListener("input", choose);
  which.addEventListener("change", choose);
  grid.addEventListener("scroll", () => requestAnimationFrame(drawRows));
  grid.addEventListener("keydown", gridKey);
  space.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) {
      cursor = Number(row.dataset.place);
      openLatent(order[cursor]);
    }
  });
  new ResizeObserver(drawRows).observe(grid);
  choose();
}

function choose() {
  const text = search.value.trim().toLowerCase();
  const keep = FILTERS.find(([key]) => key === document.getElementById("which").value)[2];
  const fits = new Uint8Array(words.length + 1);
  if (text) lowered.forEach((word, i) => (fits[i + 1] = word.includes(text) ? 1 : 0));
  order = [];
  for (let i = 0; i < about.d_sae; i++) {
    const found = !text || String(i) === text || fits[overview.labels[i * N_LABELS]] || fits[overview.labels[i * N_LABELS + 1]] || fits[overview.labels[i * N_LABELS + 2]];
    if (found && keep(i)) order.push(i);
  }
  document.getElementById("count").textContent = order.length.toLocaleString("en-US");
  sortRows();
}

function sortBy(key) {
  const descending = sorting.key === key ? !sorting.descending : key !== "number" && key !== "label";
  sorting = {key, descending};
  sortRows();
}

function sortRows() {
  const {key, descending} = sorting, sign = descending ? -1 : 1;
  for (const head of document.querySelectorAll("#columns [data-key]")) {
    head.setAttribute("aria-sort", head.dataset.key !== key ? "none" : descending ? "descending" : "ascending");
  }
  if (key === "label") {
    const names = order.map((i) => [lowered[overview.labels[i * N_LABELS] - 1] ?? "\uffff", i]);
    names.sort((a, b) => (a[0] < b[0] ? -sign : a[0] > b[0] ? sign : a[1] - b[1]));
    order = names.map(([, i]) => i);
  } else if (key === "number") order.sort((a, b) => sign * (a - b));
  else order.sort((a, b) => sign * (overview[key][a] - overview[key][b]) || a - b);
  cursor = Math.max(0, order.indexOf(opened));
  grid.scrollTop = 0;
  drawRows();
}

function drawRows() {
  const height = rowHeight();
  space.style.height = `${order.length * height}px`;
  grid.setAttribute("aria-rowcount", order.length);
  const first = Math.max(0, Math.floor(grid.scrollTop / height) - 4);
  const last = Math.min(order.length, Math.ceil((grid.scrollTop + grid.clientHeight) / height) + 4);
  const rows = [];
  for (let place = first; place < last; place++) rows.push(rowOf(place, height));
  space.replaceChildren(...rows);
  if (order.length) grid.setAttribute("aria-activedescendant", `row-${cursor}`);
}

function rowOf(place, height) {
  const latent = order[place], density = overview.density[latent];
  const [label, ...others] = labelsOf(latent);
  const style = `top: ${place * height}px`;
  const state = `row${place === cursor ? " cursor" : ""}${latent === opened ? " open" : ""}${density ? "" : " silent"}`;
  const log = density ? Math.max(0, Math.min(1, 1 + Math.log10(density) / 5)) : 0;
  const cell = (name, ...content) => el("span", {role: "gridcell", class: name}, ...content);
  const made = el("div", {class: state, role: "row", id: `row-${place}`, "aria-rowindex": place + 1, "aria-selected": latent === opened, "data-place": place, "data-latent": latent, style},
    cell("number", String(latent)),
    cell("labels", el("b", {}, label ?? ""), ...others.map((word) => el("span", {}, word))),
    cell("density", percent(density)),
    cell("mean", number(overview.mean[latent])),
    cell("largest", number(overview.largest[latent])));
  made.querySelector(".density").style.setProperty("--share", `${log * 100}%`);
  return made;
}

function showCursor() {
  const height = rowHeight(), top = cursor * height;
  if (top < grid.scrollTop) grid.scrollTop = top;
  else if (top + height > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + height - grid.clientHeight;
  drawRows();
}

function moveCursor(by, open) {
  cursor = Math.max(0, Math.min(order.length - 1, cursor + by));
  showCursor();
  if (open && order.length) openLatent(order[cursor]);
}

function gridKey(event) {
  const page = Math.max(1, Math.floor(grid.clientHeight / rowHeight()) - 1);
  const steps = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity};
  if (event.key in steps) moveCursor(steps[event.key], false);
  else if (event.key === "Enter" && order.length) openLatent(order[cursor]).then(() => document.getElementById("latent").focus({preventScroll: true}));
  else return;
  event.preventDefault();
}
