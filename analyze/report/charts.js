"use strict";
// Plots as inline SVG, drawn to the width that they have and again when it changes.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = {left: 38, right: 8, top: 8, bottom: 20};

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high, n = 4) {
  const rough = (high - low) / n || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.75);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// Numbers with as many digits as tell these ticks apart.
function tickLabels(found) {
  const digits = Math.ceil(Math.log10(Math.max(...found.map(Math.abs)) / (found[1] - found[0]))) + 1;
  return (tick) => number(tick, Math.max(3, digits || 0));
}

const powerOfTen = (exponent) => (Number.isInteger(exponent) ? "1e" + exponent : number(10 ** exponent, 2));

// A figure with a caption; `draw(figure width)` fills its SVG.
function figure(title, height, draw) {
  const told = el("span");
  const image = svg("svg", {height, role: "img", "aria-label": title});
  const host = el("figure", {}, el("figcaption", {}, el("b", {}, title), told), image);
  const redraw = () => {
    const width = image.clientWidth || image.parentNode.clientWidth - 20;
    if (width > 0) {
      image.setAttribute("viewBox", `0 0 ${width} ${height}`);
      image.replaceChildren();
      draw(image, width, height, told);
    }
  };
  new ResizeObserver(redraw).observe(host);
  return host;
}

function axes(image, width, height, x, y, format = {}) {
  const sx = (value) => MARGIN.left + ((value - x[0]) / (x[1] - x[0] || 1)) * (width - MARGIN.left - MARGIN.right);
  const sy = (value) => height - MARGIN.bottom - ((value - y[0]) / (y[1] - y[0] || 1)) * (height - MARGIN.top - MARGIN.bottom);
  const [across, up] = [ticks(...x, Math.max(2, Math.floor(width / 75))), ticks(...y, Math.max(2, Math.round(height / 45)))];
  for (const tick of up) {
    image.append(svg("line", {class: "tick", x1: MARGIN.left, x2: width - MARGIN.right, y1: sy(tick), y2: sy(tick)}));
    image.append(svg("text", {x: MARGIN.left - 5, y: sy(tick) + 3.5, "text-anchor": "end"}, (format.y ?? tickLabels(up))(tick)));
  }
  for (const tick of across) {
    image.append(svg("text", {x: sx(tick), y: height - 5, "text-anchor": "middle"}, (format.x ?? tickLabels(across))(tick)));
  }
  return {sx, sy};
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

// series: [{name, x, y}]; the value at the pointer is shown in the caption.
function lineChart(title, series, {height = 132, format = number} = {}) {
  return figure(title, height, (image, width, tall, told) => {
    const x = extent(series.flatMap((s) => s.x));
    let [low, high] = extent(series.flatMap((s) => s.y));
    if (low > 0 && low < high / 2) low = 0;
    if (low === high) [low, high] = [Math.min(0, low), high || 1];
    const {sx, sy} = axes(image, width, tall, x, [low, high], {y: format});
    series.forEach((s, i) => {
      const path = s.x.map((value, j) => `${j ? "L" : "M"}${sx(value).toFixed(1)} ${sy(s.y[j]).toFixed(1)}`).join("");
      image.append(svg("path", {class: "curve", d: path, stroke: `var(--s${i % 8})`}));
    });
    const near = svg("line", {class: "near", y1: MARGIN.top, y2: tall - MARGIN.bottom, visibility: "hidden"});
    image.append(near);
    const last = () => (told.textContent = series.length === 1 ? format(series[0].y.at(-1)) : "");
    last();
    image.onpointerleave = () => (last(), near.setAttribute("visibility", "hidden"));
    image.onpointermove = (event) => {
      const at = x[0] + ((event.offsetX - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (x[1] - x[0]);
      const closest = series.map((s) => s.x.reduce((best, value, i) => (Math.abs(value - at) < Math.abs(s.x[best] - at) ? i : best), 0));
      const step = series[0].x[closest[0]];
      near.setAttribute("visibility", "visible");
      near.setAttribute("x1", sx(step));
      near.setAttribute("x2", sx(step));
      told.textContent = `step ${number(step)}: ` + series.map((s, i) => format(s.y[closest[i]])).join(", ");
    };
  });
}

// edges (n + 1) and counts (n); x as powers of ten where `log` says so.
function histogram(title, edges, counts, {log = false, caption = "", height = 132, bar = null} = {}) {
  return figure(title, height, (image, width, tall, told) => {
    told.textContent = caption;
    const x = [edges[0], edges.at(-1)];
    const format = log ? {x: powerOfTen} : {x: bar ?? number};
    const {sx, sy} = axes(image, width, tall, x, [0, Math.max(1, extent(counts)[1])], format);
    counts.forEach((count, i) => {
      if (!count) return;
      const left = sx(edges[i]), right = sx(edges[i + 1]);
      const made = svg("rect", {class: "bar", x: left, width: Math.max(0.7, right - left - 0.6), y: sy(count), height: Math.max(0.7, sy(0) - sy(count))});
      const value = (e) => (log ? number(10 ** e) : (bar ?? number)(e));
      made.append(svg("title", {}, `${value(edges[i])} to ${value(edges[i + 1])}: ${count.toLocaleString("en-US")}`));
      image.append(made);
    });
  });
}

// bars: [[name, share]]
function shares(title, bars, height = 132) {
  return figure(title, height, (image, width, tall) => {
    const step = (tall - 12) / bars.length, high = Math.min(16, step - 3);
    bars.forEach(([name, share], i) => {
      const y = 8 + i * step;
      image.append(svg("text", {x: 92, y: y + high / 2 + 3.5, "text-anchor": "end"}, name.slice(0, 16)));
      image.append(svg("rect", {class: "bar", x: 98, y, height: high, width: Math.max(0.7, share * (width - 140))}));
      image.append(svg("text", {x: 102 + share * (width - 140), y: y + high / 2 + 3.5}, percent(share)));
    });
  });
}

// points: [{name, group, x, y}], one color per group, lines between the points of a group.
function scatter(title, points, xName, yName, height = 280) {
  const groups = [...new Set(points.map((p) => p.group))];
  const host = figure(title, height, (image, width, tall, told) => {
    told.textContent = `${yName} against ${xName}`;
    const wide = ([low, high]) => [low - (high - low || low || 1) * 0.06, high + (high - low || high || 1) * 0.06];
    const {sx, sy} = axes(image, width, tall, wide(extent(points.map((p) => p.x))), wide(extent(points.map((p) => p.y))));
    groups.forEach((group, i) => {
      const own = points.filter((p) => p.group === group).sort((a, b) => a.x - b.x);
      const path = own.map((p, j) => `${j ? "L" : "M"}${sx(p.x)} ${sy(p.y)}`).join("");
      image.append(svg("path", {class: "curve", d: path, stroke: `var(--s${i % 8})`, opacity: 0.5}));
      for (const p of own) {
        const dot = svg("circle", {class: "dot", cx: sx(p.x), cy: sy(p.y), r: 4.5, fill: `var(--s${i % 8})`});
        dot.append(svg("title", {}, `${p.name}: ${xName} ${number(p.x)}, ${yName} ${number(p.y)}`));
        image.append(dot);
        if (points.length <= 16) {
          const end = sx(p.x) > width - 110;
          image.append(svg("text", {x: sx(p.x) + (end ? -8 : 8), y: sy(p.y) - 5, "text-anchor": end ? "end" : "start"}, p.name.slice(0, 24)));
        }
      }
    });
  });
  host.append(legend(groups));
  return host;
}

function legend(names) {
  return el("div", {class: "legend"}, ...names.map((name, i) => el("span", {}, el("i", {style: `background: var(--s${i % 8})`}), name)));
}
