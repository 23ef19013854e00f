// Runs the engine in a worker, so that the page never freezes. The page appends this file to engine.js and load.js.
//
// The page sends {id, method, args}; the answer is {id, result} or {id, error}. While a story is extended, {id, token}
// messages announce each token.

let model, tokenizer; // of the page
let story, decode, random, isStopped; // the story that the page shows
let lastPause = 0;

/** Lets messages arrive, every 20 ms: a timer may take 4 ms. */
async function pause() {
  if (performance.now() - lastPause < 20) return;
  await new Promise((resolve) => setTimeout(resolve));
  lastPause = performance.now();
}

/** The ids of a prompt; an empty one starts from the end-of-text token. */
function promptIds(prompt) {
  const ids = tokenizer.encode(prompt);
  return ids.length ? ids : [tokenizer.eotToken];
}

const methods = {
  async load(base64) {
    const characters = atob(base64), bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    let info;
    ({ model, tokenizer, info } = await loadModel(bytes));
    return { ...info, config: model.config };
  },

  encode: (text) => tokenizer.encode(text),

  /** The logits of the token after `ids`. */
  logits: (ids) => Float32Array.from(new Story(model, ids).read()),

  /** A story that begins with `prompt`, as `Storyteller.generate` returns it. */
  async generate(prompt, { maxNewTokens = 500, seed = 0, ...settings } = {}) {
    const story = new Story(model, promptIds(prompt)), decode = tokenizer.decoder(), random = randomNumbers(seed);
    let text = prompt;
    for (let i = 0; i < maxNewTokens; i++) {
      const { id } = story.next(settings, random), isLast = id === tokenizer.eotToken || i + 1 === maxNewTokens;
      text += decode(id, isLast);
      if (isLast) break;
      await pause();
    }
    return text;
  },

  /** Reads a prompt. Returns the tokens that the model reads and how many tokens before them it does not. */
  async begin(prompt, seed) {
    random = randomNumbers(seed);
    const ids = promptIds(prompt);
    story = new Story(model, ids);
    decode = tokenizer.decoder();
    story.read();
    const tokens = [];
    for (const [i, id] of story.ids.entries()) {
      // Nothing predicts the first token.
      tokens.push({ id, text: decode(id), surprisal: i ? surprisal(model.logits(story.states[i - 1]), id) : null });
      await pause();
    }
    return { tokens, skipped: ids.length - story.ids.length };
  },

  /** Adds at most `count` tokens to the story. Returns why it ended: "end", "stop" or "length". */
  async extend(count, settings, post) {
    isStopped = false;
    for (let i = 0; i < count; i++) {
      const { id, surprisal } = story.next(settings, random), isEnd = id === tokenizer.eotToken;
      post({ id, surprisal, text: decode(id, isEnd) });
      if (isEnd) return "end";
      await pause();
      if (isStopped) return "stop";
    }
    return "length";
  },

  stop() {
    isStopped = true;
  },

  /** The ten most likely tokens at an index of the story, and the token that is there, if it is not among them. */
  candidates(index, settings) {
    const logits = model.logits(story.states[index - 1]), own = nextTokenProbs(logits);
    const probs = nextTokenProbs(logits, settings), chosen = story.ids[index];
    const ids = mostLikely(own, 10);
    if (chosen !== undefined && !ids.includes(chosen)) ids.push(chosen);
    return ids.map((id) => ({
      text: tokenizer.decoder()(id, true),
      isEnd: id === tokenizer.eotToken,
      isChosen: id === chosen,
      rank: own.reduce((rank, p) => rank + (p > own[id]), 1),
      own: own[id], // at temperature 1, without top-k and top-p
      prob: probs[id],
    }));
  },

  /** The attention of one head: row t of `weights` (T, T) is what token `start` + t attends to. */
  attention(layer, head) {
    const end = story.start + story.cache.length; // the last token may not have been read yet
    if (end < story.ids.length && story.cache.length < model.config.block_size) story.read();
    const T = story.cache.length, weights = new Float32Array(T * T);
    for (let t = 0; t < T; t++) weights.set(model.attentionWeights(story.cache, layer, head, t), t * T);
    return { start: story.start, T, weights };
  },
};

/** The ids of the k largest probabilities, in descending order. */
function mostLikely(probs, k) {
  const smallest = probs.slice().sort()[Math.max(0, probs.length - k)], ids = [];
  probs.forEach((p, id) => p >= smallest && ids.push(id));
  return ids.sort((a, b) => probs[b] - probs[a]).slice(0, k);
}

onmessage = async ({ data: { id, method, args } }) => {
  try {
    const post = (token) => postMessage({ id, token });
    postMessage({ id, result: await methods[method](...args, post) });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
};
