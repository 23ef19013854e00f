// The engine of an exported page: StoryLLM's tokenizer, GPT and sampler, without dependencies.
//
// It follows data/tokenizer.py, model/gpt.py, model/decoding.py and model/sampling.py and uses their names.
// Shapes: T tokens, C = n_embd, H = n_head, D = C / H. A matrix is one typed array, row after row.

// Text <-> token ids

// GPT2_PATTERN in data/tokenizer.py. \s differs between the languages, \p{White_Space} does not.
const PATTERN = new RegExp(String.raw`'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
  .replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}"), "gu");

/** Byte-level BPE (Sennrich et al. 2016). Bytes are strings with a character from 0 to 255 for each byte. */
export class Tokenizer {
  constructor(vocabulary) {
    this.tokens = vocabulary.split(" ").map(atob); // the bytes of each token but the last
    this.ranks = new Map(this.tokens.map((bytes, id) => [bytes, id]));
    this.eotToken = this.tokens.length;
  }

  encode(text) {
    const ids = [], encoder = new TextEncoder();
    for (const [word] of text.matchAll(PATTERN)) {
      let bytes = "";
      for (const byte of encoder.encode(word)) bytes += String.fromCharCode(byte);
      const id = this.ranks.get(bytes);
      if (id !== undefined) ids.push(id);
      else for (const part of this.bytePairs(bytes)) ids.push(part);
    }
    return ids;
  }

  /** Merges the adjacent pair whose token has the lowest rank, the leftmost first, until no pair is a token. */
  bytePairs(bytes) {
    const n = bytes.length;
    const end = Int32Array.from({ length: n }, (_, i) => i + 1); // bytes[i, end[i]) is a token; 0: inside another
    const previous = Int32Array.from({ length: n }, (_, i) => i - 1); // the start of the token before
    const rank = (i) => (end[i] && end[i] < n ? this.ranks.get(bytes.slice(i, end[end[i]])) : undefined);
    const pairs = []; // a heap, so that a word of a million letters takes seconds and not days
    const push = (i) => rank(i) !== undefined && pushHeap(pairs, rank(i) * 2 ** 32 + i);
    for (let i = 0; i < n; i++) push(i);
    while (pairs.length) {
      const key = popHeap(pairs), i = key % 2 ** 32;
      if (rank(i) !== Math.floor(key / 2 ** 32)) continue; // another merge changed this pair
      const right = end[i];
      end[i] = end[right];
      end[right] = 0;
      if (end[i] < n) previous[end[i]] = i;
      push(i);
      if (i > 0) push(previous[i]);
    }
    const ids = [];
    for (let i = 0; i < n; i = end[i]) ids.push(this.ranks.get(bytes.slice(i, end[i])));
    return ids;
  }

  /** A function from ids to text, one at a time: a character may span several tokens and comes with its last one. */
  decoder() {
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    return (id, isLast = false) => {
      const bytes = this.tokens[id] ?? ""; // the end-of-text token has no bytes
      return utf8.decode(Uint8Array.from(bytes, (c) => c.charCodeAt(0)), { stream: !isLast });
    };
  }
}

/** Adds a number to a binary heap: an array in which heap[i] is at most heap[2 i + 1] and heap[2 i + 2]. */
function pushHeap(heap, key) {
  let i = heap.push(key) - 1;
  for (let up; i > 0 && heap[(up = (i - 1) >> 1)] > key; i = up) heap[i] = heap[up];
  heap[i] = key;
}

/** Removes and returns the smallest number of a binary heap. */
function popHeap(heap) {
  const smallest = heap[0], key = heap.pop();
  if (heap.length === 0) return smallest;
  let i = 0;
  for (let child; (child = 2 * i + 1) < heap.length; i = child) {
    if (heap[child + 1] < heap[child]) child++;
    if (heap[child] >= key) break;
    heap[i] = heap[child];
  }
  heap[i] = key;
  return smallest;
}

// Token ids -> logits

/** Queries, keys and values of the tokens read so far. Only a heat map of the attention needs the queries again. */
export class KVCache {
  constructor({ n_layer, block_size, n_embd }) {
    this.data = Array.from({ length: n_layer }, () => new Float64Array(block_size * 3 * n_embd)); // (T, 3 C) per layer
    this.length = 0; // number of cached tokens
  }
}

/** GPT-2's architecture. `tensors` has the names of the state dict; the head shares the token embedding. */
export class GPT {
  constructor(config, tensors) {
    this.config = config;
    this.tensors = tensors;
    this.activation = config.activation === "gelu_tanh" ? geluTanh : gelu;
  }

  /** The T ids after the cached tokens to their (T, C) final hidden states. */
  hidden(ids, cache) {
    const T = ids.length, C = this.config.n_embd, x = new Float64Array(T * C);
    const [wte, wpe] = ["wte", "wpe"].map((name) => this.tensors[`transformer.${name}.weight`].data);
    ids.forEach((id, t) => {
      for (let c = 0; c < C; c++) x[t * C + c] = wte[id * C + c] + wpe[(cache.length + t) * C + c];
    });
    for (let layer = 0; layer < this.config.n_layer; layer++) {
      const block = `transformer.h.${layer}`;
      add(x, this.attention(layer, this.layerNorm(`${block}.ln_1`, x), cache));
      add(x, this.mlp(`${block}.mlp`, this.layerNorm(`${block}.ln_2`, x)));
    }
    cache.length += T;
    return this.layerNorm("transformer.ln_f", x);
  }

  /** (T, C) final hidden states to (T, vocab_size) logits. */
  logits(x) {
    return this.linear("transformer.wte", x);
  }

  attention(layer, x, cache) {
    const { n_embd: C, n_head: H } = this.config, D = C / H, T = x.length / C, first = cache.length;
    const qkv = cache.data[layer], y = new Float64Array(T * C);
    qkv.set(this.linear(`transformer.h.${layer}.attn.c_attn`, x), first * 3 * C);
    for (let t = 0; t < T; t++) {
      for (let head = 0; head < H; head++) {
        const weights = this.attentionWeights(cache, layer, head, first + t);
        for (let s = 0; s < weights.length; s++) {
          const v = s * 3 * C + 2 * C + head * D, out = t * C + head * D, weight = weights[s];
          for (let d = 0; d < D; d++) y[out + d] += weight * qkv[v + d];
        }
      }
    }
    return this.linear(`transformer.h.${layer}.attn.c_proj`, y);
  }

  /** What the token at `position` attends to, itself and each earlier token: softmax(q k^T / sqrt(D)) of one head. */
  attentionWeights(cache, layer, head, position) {
    const { n_embd: C, n_head: H } = this.config, D = C / H, qkv = cache.data[layer];
    const q = position * 3 * C + head * D, scores = new Float64Array(position + 1);
    for (let s = 0; s <= position; s++) {
      const k = s * 3 * C + C + head * D;
      let score = 0;
      for (let d = 0; d < D; d++) score += qkv[q + d] * qkv[k + d];
      scores[s] = score / Math.sqrt(D);
    }
    return softmax(scores);
  }

  mlp(name, x) {
    return this.linear(`${name}.c_proj`, this.linear(`${name}.c_fc`, x).map(this.activation));
  }

  layerNorm(name, x) {
    const C = this.config.n_embd, y = new Float64Array(x.length);
    const { data: weight } = this.tensors[`${name}.weight`], bias = this.tensors[`${name}.bias`]?.data;
    for (let row = 0; row < x.length; row += C) {
      let mean = 0, variance = 0;
      for (let c = 0; c < C; c++) mean += x[row + c] / C;
      for (let c = 0; c < C; c++) variance += (x[row + c] - mean) ** 2 / C;
      const scale = 1 / Math.sqrt(variance + 1e-5);
      for (let c = 0; c < C; c++) y[row + c] = (x[row + c] - mean) * scale * weight[c] + (bias ? bias[c] : 0);
    }
    return y;
  }

  /** (T, n) times the transposed (out, n) weight, plus the bias: (T, out). Nearly all the time is spent here. */
  linear(name, x) {
    const { data: weight, rows: out } = this.tensors[`${name}.weight`], bias = this.tensors[`${name}.bias`]?.data;
    const n = weight.length / out, y = new Float64Array((x.length / n) * out);
    for (let o = 0; o < out; o += 4) {
      for (let t = 0; t < x.length / n; t += 2) multiply(x, weight, y, n, t, o);
    }
    if (bias) for (let i = 0; i < y.length; i++) y[i] += bias[i % out];
    return y;
  }
}

/**
 * Rows t and t + 1 of x times rows o to o + 3 of w. At the end, the last row takes the place of missing ones.
 *
 * Each number that is read is used two or four times, and the CPU computes the independent sums in parallel.
 */
function multiply(x, w, y, n, t, o) {
  const out = w.length / n, last = out - 1, t1 = Math.min(t + 1, x.length / n - 1);
  const o1 = Math.min(o + 1, last), o2 = Math.min(o + 2, last), o3 = Math.min(o + 3, last);
  let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
  for (let i = 0; i < n; i++) {
    const a = x[t * n + i], b = x[t1 * n + i];
    const w0 = w[o * n + i], w1 = w[o1 * n + i], w2 = w[o2 * n + i], w3 = w[o3 * n + i];
    a0 += a * w0; a1 += a * w1; a2 += a * w2; a3 += a * w3;
    b0 += b * w0; b1 += b * w1; b2 += b * w2; b3 += b * w3;
  }
  y[t * out + o] = a0; y[t * out + o1] = a1; y[t * out + o2] = a2; y[t * out + o3] = a3;
  y[t1 * out + o] = b0; y[t1 * out + o1] = b1; y[t1 * out + o2] = b2; y[t1 * out + o3] = b3;
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** x P(X <= x) of a normal variable; erf from Abramowitz and Stegun 7.1.26, with an error below 2e-7. */
function gelu(x) {
  const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * z);
  const tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  const erf = Math.sign(x) * (1 - tail * Math.exp(-z * z));
  return 0.5 * x * (1 + erf);
}

/** The tanh approximation of gelu, which OpenAI's models use. */
function geluTanh(x) {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}

// Logits -> the next token

function check(condition, message) {
  if (!condition) throw new RangeError(message);
}

function softmax(x) {
  const largest = x.reduce((a, b) => Math.max(a, b)), exp = x.map((value) => Math.exp(value - largest));
  const sum = exp.reduce((a, b) => a + b);
  return exp.map((value) => value / sum);
}

/** The negative log-probability of a token in nats: how much it surprises the model. */
export const surprisal = (logits, id) => -Math.log(Math.max(softmax(logits)[id], 1e-300));

/** The distribution of the next token, (vocab_size) logits to probabilities: `next_token_probs` in sampling.py. */
export function nextTokenProbs(logits, { temperature = 1, topK = null, topP = null } = {}) {
  check(temperature >= 0 && temperature < Infinity, `temperature is ${temperature}, must be 0 (greedy) or greater`);
  check(topK === null || (Number.isInteger(topK) && topK >= 1), `topK is ${topK}, must be an integer above 0, or null`);
  check(topP === null || (topP > 0 && topP <= 1), `topP is ${topP}, must be greater than 0 and at most 1, or null`);
  const largest = logits.reduce((a, b) => Math.max(a, b));
  if (temperature === 0) return keepMostLikely(logits.map((logit) => (logit === largest ? 1 : 0)), 1);
  let probs = softmax(logits.map((logit) => (logit - largest) / Math.max(temperature, 1e-30)));
  if (topK !== null && topK < probs.length) probs = keepMostLikely(probs, topK);
  if (topP !== null && topP < 1) {
    // Tokens below (1 - topP) / V together hold less than 1 - topP, so only the others need sorting.
    const sorted = probs.filter((p) => p > (0.5 * (1 - topP)) / probs.length).sort();
    let kept = 0;
    for (let sum = 0; kept < sorted.length && sum < topP; kept++) sum += sorted[sorted.length - 1 - kept];
    probs = keepMostLikely(probs, kept, sorted);
  }
  return probs;
}

/** The distribution of exactly the k most likely tokens, even with ties; of tied ones, the first. */
function keepMostLikely(probs, k, sorted = probs.slice().sort()) {
  const smallest = sorted[sorted.length - k];
  let ties = k - probs.reduce((count, p) => count + (p > smallest), 0);
  const kept = probs.map((p) => (p > smallest || (p === smallest && ties-- > 0) ? p : 0));
  const sum = kept.reduce((a, b) => a + b);
  return kept.map((p) => p / sum);
}

/** Draws an id from a distribution with a number from [0, 1): inverse transform sampling. */
export function sample(probs, uniform) {
  let sum = 0, last = 0;
  for (let id = 0; id < probs.length; id++) {
    if (probs[id] > 0) {
      sum += probs[id];
      last = id; // rounding may leave the sum a little below 1
      if (uniform < sum) break;
    }
  }
  return last;
}

/** Numbers from [0, 1) that depend on the seed alone: a counter, hashed with MurmurHash3's finalizer (Appleby 2011). */
export function randomNumbers(seed) {
  check(Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32, `seed is ${seed}, must be an integer below 2**32`);
  let counter = Math.imul(seed + 1, 0x9e3779b1);
  return () => {
    counter = (counter + 0x9e3779b9) | 0;
    let x = counter;
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return ((x ^ (x >>> 16)) >>> 0) / 2 ** 32;
  };
}

/** A story in progress, read and extended as by `decode` in decoding.py. */
export class Story {
  constructor(model, ids) {
    this.model = model;
    this.ids = ids.slice(-model.config.block_size); // the model reads only the end of a longer prompt
    this.states = []; // the final hidden state at each token, from which the next one was predicted
    this.cache = new KVCache(model.config);
    this.start = 0; // index of the first token in the cache
  }

  /** Reads the tokens that have not been read; returns the logits of the next one. */
  read() {
    const { block_size, n_embd: C } = this.model.config;
    if (this.ids.length - this.start > block_size) { // beyond the context every position shifts: read it all again
      this.start = this.ids.length - block_size;
      this.cache.length = 0;
    }
    const first = this.start + this.cache.length, unread = this.ids.slice(first);
    if (unread.length) {
      const x = this.model.hidden(unread, this.cache);
      unread.forEach((_, t) => (this.states[first + t] ??= x.slice(t * C, (t + 1) * C)));
    }
    return this.model.logits(this.states.at(-1));
  }

  /** Adds a token and returns its id and surprisal. */
  next(settings, random) {
    const logits = this.read(), id = sample(nextTokenProbs(logits, settings), random());
    this.ids.push(id);
    return { id, surprisal: surprisal(logits, id) };
  }
}
