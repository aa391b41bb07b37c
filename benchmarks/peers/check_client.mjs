// Read a bundle as other people's JavaScript does: onnxruntime-node and @huggingface/transformers.
//
//     node check_client.mjs BUNDLE CASES.json
//
// Token ids and probabilities must be those of CASES.json (python -m emodistill.benchmarks.clients), once through a
// session of our own and once through the text-classification pipeline. Ends with one JSON line; exits 1 on a difference.
//
// @huggingface/transformers 4.3 cuts a long text after adding [SEP], and so loses it. Our own session therefore gets ids
// that are cut here, [SEP] kept, and the pipeline is not compared on texts that are too long.

import { readFileSync } from "node:fs";
import path from "node:path";
import { AutoTokenizer, env, pipeline } from "@huggingface/transformers";
import { InferenceSession, Tensor } from "onnxruntime-node";

const LARGEST_DIFFERENCE = 1e-4;
const PIPELINE_DTYPES = { "onnx/model.onnx": "fp32", "onnx/model_quantized.onnx": "q8" };

const [bundle, casesPath] = process.argv.slice(2).map((name) => path.resolve(name));
const cases = JSON.parse(readFileSync(casesPath, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(bundle);
const name = path.basename(bundle);
const maxLength = cases.max_length_tokens;

function largestDifference(found, expected) {
  return found.reduce((most, value, i) => Math.max(most, Math.abs(value - expected[i])), 0);
}

function feeds(session, ids) {
  const input = {};
  session.inputNames.forEach((inputName, i) => {
    const wide = session.inputMetadata[i].type === "int64";
    const values = inputName === "input_ids" ? ids : ids.map(() => (inputName === "attention_mask" ? 1 : 0));
    const data = wide ? BigInt64Array.from(values, BigInt) : Int32Array.from(values);
    input[inputName] = new Tensor(wide ? "int64" : "int32", data, [1, ids.length]);
  });
  return input;
}

const tokenizer = await AutoTokenizer.from_pretrained(name);
const otherIds = [];
const tooLong = [];
const foundIds = cases.texts.map((text, i) => {
  let ids = Array.from(tokenizer(text).input_ids.data, Number);
  tooLong.push(ids.length > maxLength);
  if (ids.length > maxLength) ids = [...ids.slice(0, maxLength - 1), ids.at(-1)];
  if (JSON.stringify(ids) !== JSON.stringify(cases.ids[i])) otherIds.push(text);
  return ids;
});

const differences = {};
for (const [graph, expected] of Object.entries(cases.probabilities)) {
  const session = await InferenceSession.create(path.join(bundle, graph));
  let most = 0;
  for (const [i, ids] of foundIds.entries()) {
    const { probabilities } = await session.run(feeds(session, ids));
    most = Math.max(most, largestDifference(Array.from(probabilities.data), expected[i]));
  }
  differences[graph] = most;
  if (!(graph in PIPELINE_DTYPES)) continue;
  const classify = await pipeline("text-classification", name, { dtype: PIPELINE_DTYPES[graph] });
  most = 0;
  for (const [i, text] of cases.texts.entries()) {
    if (tooLong[i]) continue;
    const answer = Object.fromEntries((await classify(text, { top_k: null })).map(({ label, score }) => [label, score]));
    most = Math.max(most, largestDifference(cases.label_names.map((label) => answer[label]), expected[i]));
  }
  differences[`${graph} pipeline`] = most;
}

console.log(JSON.stringify({ texts: cases.texts.length, other_ids: otherIds, max_probability_difference: differences }));
// NaN, where a label is missing, is no small difference.
const fine = Object.values(differences).every((difference) => difference <= LARGEST_DIFFERENCE);
process.exit(otherIds.length === 0 && fine ? 0 : 1);
