// The AI SDK against a sidecar at SIDECAR_URL, with the key SIDECAR_KEY.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import {
  APICallError,
  experimental_generateSpeech as generateSpeech,
  generateText,
  Output,
  streamText,
  tool,
} from "ai";
import { z } from "zod";

const baseURL = process.env.SIDECAR_URL;
const apiKey = process.env.SIDECAR_KEY;
const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({
  name: "osiris",
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = {
  "chat completions": openai.chat("hermes"),
  responses: openai.responses("hermes"),
  "OpenAI-compatible": compatible("hermes"),
};
const prompt = "Long AAPL from 182.40, now 191.10, RSI 78 after a strong run.";
const settings = { prompt, temperature: 0, maxOutputTokens: 96, maxRetries: 0 };
const Position = z.object({
  ticker: z.string().regex(/^[A-Z]{1,5}$/),
  shares: z.number().int().min(0).max(999),
  isLong: z.boolean(),
});

for (const [name, model] of Object.entries(models)) {
  test(`${name}: text and usage`, async () => {
    const { text, usage, finishReason } = await generateText({ model, ...settings });
    assert.notEqual(text, "");
    assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
    assert.equal(finishReason, "stop");
  });

  test(`${name}: a stream has the text and the usage of the plain answer`, async () => {
    const plain = await generateText({ model, ...settings });
    const stream = streamText({ model, ...settings });
    let text = "";
    for await (const part of stream.textStream) text += part;
    assert.equal(text, plain.text);
    assert.equal((await stream.usage).totalTokens, plain.usage.totalTokens);
  });

  test(`${name}: an answer follows the client's schema`, async () => {
    const output = Output.object({ schema: Position });
    const answer = await generateText({ model, ...settings, output });
    assert.ok(Position.safeParse(answer.output).success);
  });

  test(`${name}: a forced tool is called with valid arguments`, async () => {
    const buy = tool({ description: "Buys shares.", inputSchema: Position });
    const { toolCalls } = await generateText({
      model,
      ...settings,
      tools: { buy },
      toolChoice: "required",
    });
    assert.equal(toolCalls.length, 1);
    assert.ok(Position.safeParse(toolCalls[0].input).success);
  });

  test(`${name}: the result of a tool continues the chat`, async () => {
    const buy = tool({
      description: "Buys shares.",
      inputSchema: Position,
      execute: async () => "bought",
    });
    const { steps } = await generateText({
      model,
      ...settings,
      tools: { buy },
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
      stopWhen: ({ steps }) => steps.length === 2,
    });
    assert.equal(steps.length, 2);
    assert.equal(steps[0].toolResults[0].output, "bought");
    assert.notEqual(steps[1].text, "");
  });
}

test("a completion continues the prompt", async () => {
  const { text } = await generateText({ model: openai.completion("hermes"), ...settings });
  assert.notEqual(text, "");
});

test("speech is WAV", async () => {
  const { audio } = await generateSpeech({
    model: openai.speech("tts-1"),
    text: "Long Apple.",
    outputFormat: "wav",
  });
  assert.equal(Buffer.from(audio.uint8Array).subarray(0, 4).toString(), "RIFF");
});

test("an error has the status and the message", async () => {
  const failed = generateText({ model: openai.chat("gpt-5"), ...settings });
  await assert.rejects(failed, (error) => {
    assert.ok(APICallError.isInstance(error));
    assert.equal(error.statusCode, 404);
    assert.match(error.message, /no such model/);
    return true;
  });
});
