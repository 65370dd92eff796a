"use strict";
// Data of the page: facts as JSON, latents as base64 of deflated arrays (analyze/report/packed.py), decoded when needed.

const facts = JSON.parse(document.getElementById("facts").textContent);
const about = facts.latents;
const ARRAYS = {u1: Uint8Array, i1: Int8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array};
const KEPT_BLOBS = 64;
const blobs = new Map();

async function inflate(name) {
  const text = atob(document.getElementById("blob-" + name).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  // Written and read here: a Blob or a Response would pass every part through another process of the browser.
  const stream = new DecompressionStream("deflate-raw"), writer = stream.writable.getWriter(), reader = stream.readable.getReader();
  writer.write(bytes);
  writer.close();
  const parts = [];
  for (let read = await reader.read(); !read.done; read = await reader.read()) parts.push(read.value);
  const whole = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  parts.reduce((place, part) => (whole.set(part, place), place + part.length), 0);
  return whole.buffer;
}

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const found = {};
  let place = 4 + length;
  for (const [name, kind, n] of header) {
    found[name] = new ARRAYS[kind](buffer, place, n);
    place += Math.ceil((n * ARRAYS[kind].BYTES_PER_ELEMENT) / 8) * 8;
  }
  return found;
}

// A decoded blob; the last 64 are kept.
function blob(name, decode) {
  if (!blobs.has(name)) {
    if (blobs.size >= KEPT_BLOBS) blobs.delete(blobs.keys().next().value);
    blobs.set(name, inflate(name).then(decode));
  }
  return blobs.get(name);
}

const arrays = (name) => blob(name, unpack);
const json = (name) => blob(name, (buffer) => JSON.parse(new TextDecoder().decode(buffer)));

// An element; strings become text nodes, never markup.
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "click") made.addEventListener("click", value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
}

const thousands = (n) => (n < 10000 ? String(n) : `${Math.round(n / 1000)}k`);

const percent = (share) => (share === 0 ? "0" : share < 1e-5 ? (share * 100).toExponential(0) : number(share * 100, 2)) + "%";
