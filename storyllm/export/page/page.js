// The page: its controls, the story and what the model saw. The engine runs in a worker (worker.js).
"use strict";

const element = (id) => document.getElementById(id);

/** Control characters and those that change the direction of text, escaped (`printable` in config.py). */
const printable = (text) => text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g,
  (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** The text of a token where spaces matter. */
const visible = (text) => printable(text).replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");

const percent = (p) => (p === 0 ? "0" : p < 0.001 ? "<0.1" : (100 * p).toFixed(1)) + "%";
const count = (n) => n.toLocaleString("en-US");

function create(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

// The worker

// A file:// page may not start a worker that is a module, only a script, which exports nothing.
const source = element("worker").textContent.replace(/^export /gm, "");
const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
const calls = new Map(); // id -> {resolve, reject, onToken}
let lastCall = 0;

/** Calls a method of the worker. */
function call(method, args = [], onToken = null) {
  return new Promise((resolve, reject) => {
    calls.set(++lastCall, { resolve, reject, onToken });
    worker.postMessage({ id: lastCall, method, args });
  });
}

worker.onmessage = ({ data: { id, token, result, error } }) => {
  const { resolve, reject, onToken } = calls.get(id);
  if (token) return onToken(token);
  calls.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
};
worker.onerror = (event) => showStatus(`The model cannot run in this browser: ${event.message}`);

const loaded = call("load", [element("model-file").textContent]);
element("model-file").remove(); // the worker has its own copy

window.storyllm = {
  /** The token ids of a text. */
  encode: (text) => loaded.then(() => call("encode", [String(text)])),
  /** The logits of the token after these ids, a Float32Array. */
  logits: (ids) => loaded.then(() => call("logits", [Array.from(ids)])),
  /** The text of a story. Options: maxNewTokens, temperature, topK, topP, seed. */
  generate: (prompt = "", options = {}) => loaded.then(() => call("generate", [String(prompt), options])),
};

// Settings

function settings() {
  const topK = Number(element("top-k").value), topP = Number(element("top-p").value);
  return {
    temperature: Number(element("temperature").value),
    topK: topK === 0 ? null : topK,
    topP: topP === 1 ? null : topP,
  };
}

function showSettings() {
  const { temperature, topK, topP } = settings();
  element("temperature-value").textContent = temperature === 0 ? "0 (greedy)" : temperature.toFixed(2);
  element("top-k-value").textContent = topK ?? "off";
  element("top-p-value").textContent = topP === null ? "off" : topP.toFixed(2);
}

for (const id of ["temperature", "top-k", "top-p"]) {
  element(id).addEventListener("input", () => {
    showSettings();
    showCandidates();
  });
}
element("new-seed").addEventListener("click", () => {
  element("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => {
    element("prompt").value = button.dataset.prompt ?? button.textContent;
  });
}

// The story

const FULL_SHADE = 6; // nats; the shade of rarer tokens (1 in 400) is the same
let info = null; // of the model
let tokens = []; // {text, surprisal, node}
let selected = -1; // index of a token; tokens.length: the one that would come next
let attention = null; // {layer, head, start, T, weights}
let isRunning = false, stopRequested = false;

const showStatus = (text) => (element("status").textContent = text);

function setRunning(running) {
  isRunning = running;
  element("generate").textContent = running ? "Stop" : "Generate";
  element("continue").disabled = true;
}

function addToken({ id, text, surprisal }) {
  const isEnd = id === info.config.vocab_size - 1, index = tokens.length;
  const node = create("span", { className: isEnd ? "token end" : "token", tabIndex: index ? -1 : 0, role: "option" });
  node.textContent = isEnd ? (index ? "end" : "start") : printable(text);
  node.dataset.index = index;
  node.setAttribute("aria-selected", "false");
  const cost = surprisal === null ? "not predicted" : `surprisal ${surprisal.toFixed(2)} nats`;
  const name = text.trim() ? printable(text) : node.textContent || "part of a character";
  node.setAttribute("aria-label", `${name}, ${cost}`);
  if (text.includes("\n")) node.classList.add("newline");
  tokens.push({ text: isEnd ? `<${node.textContent}>` : text, surprisal, node });
  element("story").append(node);
  shade(index);
}

/** Shades a token by its surprisal, or by how much the selected token attends to it. */
function shade(index) {
  const mode = new FormData(element("view-form")).get("shading");
  let strength = 0;
  if (mode === "surprisal") strength = Math.min(1, (tokens[index].surprisal ?? 0) / FULL_SHADE);
  if (mode === "attention") strength = attentionTo(index);
  tokens[index].node.style.setProperty("--strength", `${Math.round(100 * strength)}%`);
}

function shadeAll() {
  const mode = new FormData(element("view-form")).get("shading");
  document.body.dataset.shading = mode;
  element("legend-low").textContent = mode === "attention" ? "no attention" : "expected";
  element("legend-high").textContent = mode === "attention" ? "most attention" : "surprising";
  tokens.forEach((_, index) => shade(index));
}

/** What the selected token attends to, relative to the largest weight in its row. */
function attentionTo(index) {
  if (!attention) return 0;
  const { start, T, weights } = attention, row = selected - start, column = index - start;
  if (row < 0 || row >= T || column < 0 || column > row) return 0;
  const largest = weights.subarray(row * T, row * T + row + 1).reduce((a, b) => Math.max(a, b));
  return weights[row * T + column] / largest;
}

async function begin() {
  tokens = [];
  attention = null;
  element("story").replaceChildren();
  select(-1);
  const { tokens: read, skipped } = await call("begin", [element("prompt").value, Number(element("seed").value)]);
  const note = element("prompt-note");
  note.hidden = skipped === 0;
  note.textContent = `The model reads only the last ${count(read.length)} tokens of the beginning (its context); `
    + `the ${count(skipped)} before them are not shown.`;
  read.forEach(addToken);
}

async function extend() {
  const started = performance.now(), first = tokens.length;
  const result = await call("extend", [Number(element("length").value), settings()], (token) => {
    addToken(token);
    const added = tokens.length - first, seconds = (performance.now() - started) / 1000;
    const beyond = tokens.length > info.config.block_size ? ", beyond the context: slower" : "";
    element("progress").textContent = `${added} tokens, ${(added / seconds).toFixed(0)} tokens/s${beyond}`;
  });
  return { result, added: tokens.length - first };
}

/** Generates a new story, or continues the one that is there. */
async function run(isNew) {
  setRunning(true);
  stopRequested = false;
  showStatus("Generating…");
  try {
    if (isNew) await begin();
    const { result, added } = stopRequested ? { result: "stop", added: 0 } : await extend();
    await showAttention();
    if (selected < 0) select(tokens.length - 1);
    const reason = { end: "The story ended", stop: "Stopped", length: "Length reached" }[result];
    showStatus(`${reason} after ${count(added)} new ${added === 1 ? "token" : "tokens"}.`);
    setRunning(false);
    element("continue").disabled = result === "end";
  } catch (error) {
    showStatus(error.message);
    setRunning(false);
  }
}

function stop() {
  stopRequested = true;
  call("stop");
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isRunning) stop(); // even if a number is invalid
  else if (info && event.target.reportValidity()) run(true);
});
element("continue").addEventListener("click", () => {
  if (!element("form").reportValidity()) return;
  element("generate").focus(); // this button is disabled now, that one stops
  run(false);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && isRunning) stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === element("prompt")) {
    element("form").requestSubmit();
  }
});

// The selected token

function select(index) {
  tokens[selected]?.node.setAttribute("aria-selected", "false");
  selected = index;
  if (index >= 0) {
    element("story").querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    tokens[index].node.setAttribute("aria-selected", "true");
    tokens[index].node.tabIndex = 0;
  }
  showCandidates();
  drawHeatMap();
  if (document.body.dataset.shading === "attention") shadeAll();
}

for (const type of ["pointerover", "focusin", "click"]) {
  element("story").addEventListener(type, (event) => {
    const index = Number(event.target.dataset.index ?? -1);
    if (index >= 0 && index !== selected) select(index);
  });
}
element("story").addEventListener("keydown", (event) => {
  const last = tokens.length - 1;
  const next = { ArrowLeft: selected - 1, ArrowRight: selected + 1, Home: 0, End: last }[event.key]
    ?? { ArrowUp: lineAway(-1), ArrowDown: lineAway(1) }[event.key];
  if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  tokens[Math.min(Math.max(next, 0), last)].node.focus();
});

/** The index of the token nearest to the selected one in the line above (-1) or below (1). */
function lineAway(direction) {
  const place = ({ node }) => node.getClientRects()[0] ?? node.getBoundingClientRect();
  const { top, left, height } = place(tokens[selected]);
  let best = selected, bestDistance = Infinity;
  tokens.forEach((token, index) => {
    const there = place(token), lines = ((there.top - top) * direction) / height;
    const distance = 1e6 * Math.round(lines) + Math.abs(there.left - left);
    if (lines > 0.5 && distance < bestDistance) [best, bestDistance] = [index, distance];
  });
  return best;
}

async function showCandidates() {
  const index = selected, caption = element("candidates-caption"), list = element("candidates");
  if (index <= 0) {
    list.replaceChildren();
    caption.textContent = index < 0 ? "Select a token of the story." : "Nothing predicts the first token.";
    return;
  }
  const rows = await call("candidates", [index, settings()]);
  if (index !== selected) return; // another token has been selected meanwhile
  const { text, surprisal } = tokens[index], chosen = rows.find((row) => row.isChosen);
  caption.textContent = `“${visible(text)}”: surprisal ${surprisal.toFixed(2)} nats, `
    + `${chosen.rank === 1 ? "the most likely token" : `number ${count(chosen.rank)} by probability`}.`;
  list.replaceChildren(...rows.map(({ text, isEnd, isChosen, own, prob, rank }) => {
    const bar = create("span", { className: "bar", ariaHidden: "true" }, create("i"), create("b"));
    bar.firstChild.style.setProperty("width", `${100 * prob}%`);
    bar.lastChild.style.setProperty("left", `${100 * own}%`);
    const label = create("span", { className: "name" }, isEnd ? "<end>" : visible(text) || "part of a character");
    const value = create("span", { className: "value" }, percent(prob));
    const row = create("li", { className: isChosen ? "chosen" : "", value: rank }, label, bar, value);
    row.title = `${percent(own)} at temperature 1, without top-k and top-p`;
    if (isChosen) label.append(create("span", { className: "hidden" }, " (chosen)"));
    return row;
  }));
}

// Attention

async function showAttention() {
  if (!tokens.length) return;
  const layer = Number(element("layer").value), head = Number(element("head").value);
  attention = { layer, head, ...(await call("attention", [layer, head])) };
  drawHeatMap();
  shadeAll();
}

function drawHeatMap() {
  const canvas = element("heat-map"), caption = element("attention-caption");
  if (!attention) {
    canvas.width = canvas.height = 1;
    canvas.setAttribute("aria-label", "No story yet");
    caption.textContent = "";
    return;
  }
  const { layer, head, start, T, weights } = attention, context = canvas.getContext("2d");
  const style = getComputedStyle(document.body);
  const components = (name) => style.getPropertyValue(name).split(" ").map(Number);
  const ink = components("--attention-rgb"), mark = components("--mark-rgb");
  canvas.width = canvas.height = T;
  canvas.setAttribute("aria-label", `Attention of layer ${layer}, head ${head}: ${T} by ${T} tokens`);
  const image = context.createImageData(T, T);
  const row = selected - start;
  for (let t = 0; t < T; t++) {
    for (let s = 0; s < T; s++) {
      const pixel = 4 * (t * T + s), color = t === row ? mark : ink;
      for (let i = 0; i < 3; i++) image.data[pixel + i] = color[i];
      // The square root makes small weights visible. The rest of the selected row is marked, too.
      image.data[pixel + 3] = 255 * (t === row && s > t ? 0.35 : Math.sqrt(weights[t * T + s]));
    }
  }
  context.putImageData(image, 0, 0);
  if (row < 0 || row >= T) {
    caption.textContent = selected < 0 ? "" : "The selected token has left the context or has not been read yet.";
    return;
  }
  const attended = Array.from(weights.subarray(row * T, row * T + row + 1), (weight, s) => [weight, s + start]);
  const most = attended.sort((a, b) => b[0] - a[0]).slice(0, 3);
  caption.textContent = `“${visible(tokens[selected].text)}” attends mostly to `
    + `${most.map(([weight, i]) => `“${visible(tokens[i].text)}” (${percent(weight)})`).join(", ")}.`;
}

element("heat-map").addEventListener("pointermove", ({ offsetX, offsetY, target }) => {
  if (!attention) return;
  const t = Math.floor((offsetY / target.clientHeight) * attention.T);
  const index = attention.start + Math.min(Math.max(t, 0), attention.T - 1);
  if (index !== selected && tokens[index]) select(index);
});
for (const id of ["layer", "head"]) element(id).addEventListener("change", showAttention);
element("view-form").addEventListener("change", () => {
  element("story").classList.toggle("boundaries", element("boundaries").checked);
  shadeAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawHeatMap);

// About the model

function facts(list, entries) {
  for (const [name, value] of entries) {
    list.append(create("dt", { className: name.toLowerCase() }, name), create("dd", {}, value));
  }
}

function showModel() {
  const { config, recipe, evaluations, parameters, weights } = info;
  const layers = `${config.n_layer} layer${config.n_layer === 1 ? "" : "s"}`;
  element("summary").textContent =
    `A language model with ${count(parameters)} parameters that writes stories in this page.`;
  facts(element("model-facts"), [
    ["Parameters", `${count(parameters)}, stored as ${weights}`],
    ["Shape", `${layers}, ${config.n_head} heads, width ${config.n_embd}`],
    ["Context", `${count(config.block_size)} tokens`],
    ["Vocabulary", `${count(config.vocab_size)} tokens`],
    ...(recipe.data.source ? [["Stories", printable(recipe.data.source)]] : []),
  ]);
  for (const [id, n] of [["layer", config.n_layer], ["head", config.n_head]]) {
    element(id).append(...Array.from({ length: n }, (_, i) => create("option", { value: i }, i)));
  }
  if (evaluations.length) {
    const last = evaluations.at(-1), best = evaluations.reduce((a, b) => (b.val_loss < a.val_loss ? b : a));
    element("training").hidden = false;
    facts(element("training-facts"), [
      ["Training", `${last.train_loss.toFixed(3)} nats per token after ${count(last.iteration)} iterations`],
      ["Validation", `${best.val_loss.toFixed(3)} nats per token, ${best.val_bits_per_byte.toFixed(3)} bits per byte`],
    ]);
    drawCurve(evaluations);
  }
  const table = element("recipe");
  for (const [part, fields] of Object.entries(recipe)) {
    for (const [name, value] of Object.entries(fields)) {
      const cells = [create("th", { scope: "row" }, `${part}.${name}`), create("td", {}, printable(String(value)))];
      table.append(create("tr", {}, ...cells));
    }
  }
}

function drawCurve(evaluations) {
  const svg = element("curve"), left = 34, right = 312, top = 8, bottom = 128;
  const losses = evaluations.flatMap(({ train_loss, val_loss }) => [train_loss, val_loss]);
  const high = Math.max(...losses), low = Math.min(0, ...losses), end = evaluations.at(-1).iteration || 1;
  const x = (iteration) => left + ((right - left) * iteration) / end;
  const y = (loss) => bottom - ((bottom - top) * (loss - low)) / (high - low || 1);
  const draw = (name, attributes, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    svg.append(node);
  };
  for (const loss of [low, (low + high) / 2, high]) {
    draw("line", { class: "grid", x1: left, x2: right, y1: y(loss), y2: y(loss) });
    draw("text", { x: left - 4, y: y(loss) + 3, "text-anchor": "end" }, loss.toFixed(1));
  }
  draw("text", { x: right, y: bottom + 14, "text-anchor": "end" }, `${count(end)} iterations`);
  for (const [name, label] of [["train_loss", "training"], ["val_loss", "validation"]]) {
    draw("polyline", { class: label, points: evaluations.map((e) => `${x(e.iteration)},${y(e[name])}`).join(" ") });
  }
  svg.setAttribute("aria-label", `Training and validation loss from ${high.toFixed(2)} to `
    + `${evaluations.at(-1).val_loss.toFixed(2)} nats per token`);
}

showSettings();
shadeAll();
loaded.then((result) => {
  info = result;
  showModel();
  element("generate").disabled = false;
  showStatus("Ready.");
}, (error) => showStatus(`The model cannot be loaded: ${error.message}`));
