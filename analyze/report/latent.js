"use strict";
// One latent: its numbers, histogram, neighbors, and examples with the tokens shaded by activation.

const panel = document.getElementById("latent");
const FULL = 127; // of an activation in a window, in units of the latent's largest / 127

async function openLatent(latent, {address = true} = {}) {
  if (!(latent >= 0 && latent < about.d_sae)) return;
  opened = latent;
  drawRows();
  const found = await readLatent(latent);
  if (opened !== latent) return; // another one was opened meanwhile
  panel.replaceChildren(...drawLatent(found));
  panel.scrollTop = 0;
  panel.classList.add("shown");
  if (address) history.replaceState(null, "", `#latent-${latent}`);
}

// Everything of a latent, decoded: {latent, numbers, examples: [{value, band, tokens, acts, own, document}]}.
async function readLatent(latent) {
  const size = about.latents_per_blob, i = latent % size, n = about.n_top + about.n_bands;
  const chunk = await arrays(`latents_${Math.floor(latent / size)}`);
  let at = 0;
  for (let e = 0; e < i * n; e++) at += chunk.length[e];
  const examples = [];
  for (let e = i * n; e < (i + 1) * n; e++) {
    const length = chunk.length[e];
    if (length) examples.push({e, at, length, band: e - i * n - about.n_top, value: chunk.value[e]});
    at += length;
  }
  await Promise.all(examples.map(async (example) => {
    const {e, length} = example;
    if (chunk.start) {
      example.tokens = await tokensOf(chunk.start[e], length);
      example.acts = chunk.activation.subarray(example.at, example.at + length);
      example.own = chunk.before[e];
    }
    if (chunk.document) {
      const per = about.documents_per_blob, place = chunk.document[e];
      example.document = (await json(`documents_${Math.floor(place / per)}`))[place % per];
    }
  }));
  return {latent, chunk, i, examples};
}

async function tokensOf(start, length) {
  const size = about.tokens_per_blob, first = Math.floor(start / size), last = Math.floor((start + length - 1) / size);
  const streams = [(await arrays(`tokens_${first}`)).token];
  if (last > first) streams.push((await arrays(`tokens_${last}`)).token);
  return Array.from({length}, (_, j) => words[streams[Math.floor((start + j) / size) - first][(start + j) % size]]);
}

function drawLatent({latent, chunk, i, examples}) {
  const density = overview.density[latent];
  const head = el("div", {class: "head"},
    el("h2", {}, `Latent ${latent}`), el("span", {class: "labels"}, labelsOf(latent).join(" \u00b7 ")),
    el("button", {type: "button", id: "previous", title: "Previous (k)", click: () => moveCursor(-1, true)}, "\u2039"),
    el("button", {type: "button", id: "next", title: "Next (j)", click: () => moveCursor(1, true)}, "\u203a"),
    el("button", {type: "button", id: "close", click: closeLatent}, "Close"));
  if (!density) return [head, el("p", {}, "Active on no row of this cache.")];
  const told = [["active on", `${percent(density)} of the rows (${Math.round(density * about.n_rows).toLocaleString("en-US")})`],
    ["mean", number(overview.mean[latent])], ["max", number(overview.largest[latent])]];
  const side = el("div", {class: "side"}, activations(chunk, i),
    listOf("Nearest decoder rows (cosine)", chunk, i, "neighbor", "cosine"),
    chunk.coactive ? listOf(`Active together (Jaccard, ${thousands(about.coactive_rows)} rows)`, chunk, i, "coactive", "coactive_score") : null,
    chunk.raised ? wordsOf("Logits raised most", chunk, i, "raised") : null,
    chunk.lowered ? wordsOf("Logits lowered most", chunk, i, "lowered") : null);
  const strongest = examples.filter((example) => example.band < 0), bands = examples.filter((example) => example.band >= 0);
  return [head, el("p", {class: "facts"}, ...told.map(([name, value]) => el("span", {}, `${name} `, el("b", {}, value)))), side,
    el("h3", {}, "Strongest examples, one per document"), list(strongest, latent),
    ...(bands.length ? [el("h3", {}, "Examples across the range"), list(bands, latent)] : []),
    ...(about.texts === "none" ? [el("p", {class: "note"}, "The cache was not there when this page was made, so the examples have no texts.")] : [])];
}

function activations(chunk, i) {
  let at = 0;
  for (let j = 0; j < i; j++) at += chunk.bin_n[j];
  const counts = [...chunk.bins.subarray(at, at + chunk.bin_n[i])];
  const edges = counts.map((_, j) => about.lowest_octave + (chunk.bin_low[i] + j) / about.bins_per_octave);
  edges.push(about.lowest_octave + (chunk.bin_low[i] + counts.length) / about.bins_per_octave);
  return histogram("Activations", edges, counts, {height: 112, bar: (octave) => number(2 ** octave, 2), caption: "log scale"});
}

function listOf(title, chunk, i, name, score) {
  const n = chunk[name].length / chunk.bin_n.length, items = [];
  for (let j = i * n; j < (i + 1) * n; j++) {
    const other = chunk[name][j];
    if (other >= about.d_sae || (name === "coactive" && !(chunk[score][j] > 0))) continue;
    items.push(el("li", {}, el("a", {href: `#latent-${other}`}, String(other)), el("span", {}, labelsOf(other).join(" ")), el("span", {}, chunk[score][j].toFixed(2))));
  }
  return el("div", {}, el("h3", {}, title), el("ul", {class: "pairs"}, ...items));
}

function wordsOf(title, chunk, i, name) {
  const n = chunk[name].length / chunk.bin_n.length, items = [];
  for (let j = i * n; j < (i + 1) * n; j++) {
    items.push(el("li", {}, el("b", {}, words[chunk[name][j]].trim() || "\u2423"), el("span", {}, ""), el("span", {}, number(chunk[`${name}_by`][j], 2))));
  }
  return el("div", {}, el("h3", {}, title), el("ul", {class: "pairs"}, ...items));
}

function list(examples, latent) {
  return el("ol", {class: "examples"}, ...examples.map((example) => el("li", {},
    el("span", {class: "value"}, number(example.value)), textOf(example, overview.largest[latent]), sourceOf(example.document))));
}

// The window of an example: what is before its token, the token, what is behind it.
function textOf({tokens, acts, own, document: from}, largest) {
  if (!tokens) return el("span", {class: "text plain", dir: "auto"}, from?.[3] ?? "");
  const parts = tokens.map((token, j) => tokenOf(j ? token : token.trimStart(), acts[j], largest, j === own));
  const [space, token] = parts[own].length > 1 ? parts[own] : ["", ...parts[own]];
  return el("span", {class: "text", dir: "auto"}, el("span", {class: "left"}, el("span", {}, ...parts.slice(0, own).flat(), space)),
    token, el("span", {class: "right"}, el("span", {}, ...parts.slice(own + 1).flat())));
}

function tokenOf(token, act, largest, own) {
  if (!act && !own) return [token];
  const text = token.replace(/^ /, ""), made = el("mark", {title: number((act / FULL) * largest)}, text);
  made.style.setProperty("--a", Math.abs(act) / FULL);
  made.className = `${own ? "own" : ""}${act < 0 ? " negative" : ""}`;
  return token.length > text.length ? [" ", made] : [made];
}

function sourceOf(from) {
  if (!from) return el("span", {class: "from"});
  const columns = Object.entries(from[2]).map(([name, value]) => el("em", {title: name}, value));
  return el("span", {class: "from", title: [from[0], ...Object.entries(from[2]).map(([name, value]) => `${name}: ${value}`)].join("\n")}, ...columns, columns.length ? " " : "", from[0]);
}

function closeLatent() {
  panel.classList.remove("shown");
  history.replaceState(null, "", "#");
  grid.focus({preventScroll: true});
}
