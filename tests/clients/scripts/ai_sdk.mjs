// The Vercel AI SDK as its users call it: node ai_sdk.mjs BASE_URL MODEL. Prints what it saw.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.NODE_MODULES}/package.json`);
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { generateText, streamText, tool, stepCountIs, Output, APICallError } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");

const [baseURL, name] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "ours", baseURL, includeUsage: true, supportsStructuredOutputs: true });
const asked = { model: provider(name), prompt: "Why is the sky blue?", maxOutputTokens: 16, temperature: 0, maxRetries: 0 };

const whole = await generateText(asked);
const stream = streamText(asked);
const pieces = [];
for await (const piece of stream.textStream) pieces.push(piece);
const streamed = await stream.usage;
const again = await generateText({
  ...asked,
  prompt: undefined,
  messages: [{ role: "user", content: asked.prompt }, ...whole.response.messages, { role: "user", content: "And red?" }],
});

const one = { ours: { parallel_tool_calls: false } }; // it runs no call of an answer that max tokens cut
const called = [];
const weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.enum(["Bern", "Rome"]) }),
  execute: async ({ city }) => {
    called.push(city);
    return "sunny";
  },
});
const looped = await generateText({
  ...asked,
  prompt: "What is the weather in Bern?",
  tools: { weather },
  toolChoice: "required",
  providerOptions: one,
  maxOutputTokens: 60,
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => (stepNumber > 0 ? { toolChoice: "none" } : {}),
});
const parts = [];
const calling = streamText({
  ...asked,
  prompt: "Weather in Rome?",
  tools: { weather },
  toolChoice: "required",
  providerOptions: one,
  maxOutputTokens: 60,
});
for await (const part of calling.fullStream) parts.push(part.type);

const city = z.object({ name: z.string().max(20), inhabitants: z.number().int().min(1).max(9) });
const object = await generateText({ ...asked, prompt: "A city.", maxOutputTokens: 80, output: Output.object({ schema: city }) });
const partial = streamText({ ...asked, prompt: "A city.", maxOutputTokens: 80, output: Output.object({ schema: city }) });
let last;
for await (const one of partial.partialOutputStream) last = one;

const refused = await generateText({ ...asked, maxOutputTokens: 1_000_000 }).catch((error) => error);
console.log(
  JSON.stringify({
    whole: whole.text,
    finish: whole.finishReason,
    usage: whole.usage.outputTokens,
    pieces,
    streamed: streamed.outputTokens,
    again: again.text,
    called: called.length,
    results: looped.steps[0].toolResults.map((result) => result.output),
    steps: looped.steps.length,
    parts,
    object: object.output,
    partial: last,
    refused: [APICallError.isInstance(refused), refused.statusCode, refused.data?.error?.code],
  }),
);
