// One side of `make bench-real`: node-llama-cpp, with the commands of real_agent.py.
//
//     node real_agent.mjs PACKAGE_FOLDER '{"file": "…", "threads": 2}'

import {createRequire} from "node:module";
import {performance} from "node:perf_hooks";
import {pathToFileURL} from "node:url";
import * as readline from "node:readline";

const [folder, options] = [process.argv[2], JSON.parse(process.argv[3])];
const require = createRequire(`${folder}/package.json`);
const {getLlama, LlamaGrammarEvaluationState} = await import(
  pathToFileURL(require.resolve("node-llama-cpp"))
);

const SLOTS = 8;
const CONTEXT = 1024;
let model, context, sequences, grammars, llama;

const now = () => performance.now() / 1000;

async function load() {
  llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: options.threads});
  model = await llama.loadModel({modelPath: options.file});
  context = await model.createContext({
    contextSize: CONTEXT, sequences: SLOTS, threads: options.threads, batchSize: 512,
  });
  sequences = Array.from({length: SLOTS}, () => context.getSequence());
  grammars = new Map();
  return {};
}

// The part of the prompt that the sequence does not hold yet.
async function rest(sequence, tokens) {
  await sequence.adaptStateToTokens(tokens.slice(0, -1), false);
  return tokens.slice(sequence.nextTokenIndex);
}

async function complete(sequence, prompt, most, grammar) {
  const tokens = model.tokenize(prompt, true);
  const evaluation = grammar === undefined ? {} : {
    grammarEvaluationState: new LlamaGrammarEvaluationState({model, grammar}),
  };
  const times = [], written = [];
  for await (const token of sequence.evaluate(await rest(sequence, tokens), {temperature: 0, ...evaluation})) {
    times.push(now());
    if (model.isEogToken(token)) break;
    written.push(token);
    if (times.length === most) break;
  }
  return {times, count: tokens.length, text: model.detokenize(written)};
}

async function generate(command) {
  let grammar;
  if (command.grammar !== undefined && command.grammar !== null) {
    if (!grammars.has(command.grammar))
      grammars.set(command.grammar, await llama.createGrammar({grammar: command.grammar}));
    grammar = grammars.get(command.grammar);
  }
  const began = now();
  const results = await Promise.all(command.prompts.map(
    (prompt, number) => complete(sequences[number], prompt, command.max_tokens, grammar)
  ));
  return {
    began,
    tokens: results.map((result) => result.times),
    prompt_tokens: results.map((result) => result.count),
    texts: results.map((result) => result.text),
  };
}

async function score(command) {
  const began = now();
  const tokens = await rest(sequences[0], model.tokenize(command.prompt, true));
  const last = tokens.at(-1);
  await sequences[0].controlledEvaluate([
    ...tokens.slice(0, -1),
    [last, {generateNext: {probabilities: true, options: {temperature: 0}}}],
  ]);
  return {seconds: now() - began};
}

const commands = {load, generate, score};

process.stdout.write("{}\n");
for await (const line of readline.createInterface({input: process.stdin})) {
  const command = JSON.parse(line);
  let answer;
  try {
    answer = await commands[command.do](command);
  } catch (error) {
    answer = {error: String(error)};
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
process.exit(0);
