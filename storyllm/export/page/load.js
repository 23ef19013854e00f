// Reads a model file. The page appends this file to engine.js.

/** Reads the model file that `pack_model` in export/web_page.py writes: {model, tokenizer, info}. */
export async function loadModel(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const array = (type, offset, size) => new type(buffer, 4 + length + offset, size);
  const tensors = {};
  for (const [name, { shape, dtype, offset, scale }] of Object.entries(header.tensors)) {
    const [rows] = shape, size = shape.reduce((a, b) => a * b);
    let data = array({ int8: Int8Array, float16: Uint16Array, float32: Float32Array }[dtype], offset, size);
    if (dtype === "int8") data = fromInt8(data, array(Float32Array, scale, rows));
    if (dtype === "float16") data = fromFloat16(data);
    tensors[name] = { data, rows };
  }
  const model = new GPT(header.config, tensors);
  return { model, tokenizer: new Tokenizer(header.vocabulary), info: header.info };
}

/** int8 numbers times the scale of their row, as float32: arithmetic with int8 is slower. */
function fromInt8(integers, scales) {
  const numbers = new Float32Array(integers.length), columns = numbers.length / scales.length;
  for (let row = 0, i = 0; row < scales.length; row++) {
    for (const end = i + columns; i < end; i++) numbers[i] = integers[i] * scales[row];
  }
  return numbers;
}

/** IEEE 754 half-precision numbers as float32. Finite numbers only. */
function fromFloat16(halves) {
  const numbers = new Float32Array(halves.length), table = Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
  });
  for (let i = 0; i < numbers.length; i++) numbers[i] = table[halves[i]];
  return numbers;
}
