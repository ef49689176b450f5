// `openai` from npm as its users call it: node openai_chat.mjs BASE_URL MODEL. Prints what it saw.

import { createRequire } from "node:module";

// NODE_MODULES: a folder with `openai` in its node_modules.
const require = createRequire(`${process.env.NODE_MODULES}/`);
const OpenAI = require("openai");
const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Why is the sky blue?" }];
const asked = { model, messages, max_tokens: 16, temperature: 0 };

const whole = await client.chat.completions.create(asked);
const pieces = [];
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  pieces.push(chunk.choices[0]?.delta?.content ?? "");
}
const stream = client.chat.completions.stream(asked);
const final = await stream.finalChatCompletion().catch((error) => error.constructor.name);
const history = [...messages, whole.choices[0].message, { role: "user", content: "And red?" }];
const again = await client.chat.completions.create({ ...asked, messages: history });
const response = await client.responses.create({ model, input: "Why is the sky blue?", max_output_tokens: 16, temperature: 0 });
const next = [{ role: "user", content: "Why is the sky blue?" }, ...response.output, { role: "user", content: "And red?" }];
const answer = await client.responses.create({ model, input: next, max_output_tokens: 16, temperature: 0 });
const refused = await client.chat.completions.create({ ...asked, max_tokens: 1_000_000 }).catch((error) => error.code);
console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    pieces,
    final: typeof final === "string" ? final : final.choices[0].message.content,
    again: again.choices[0].message.content,
    response: response.output_text,
    answer: answer.output_text,
    refused,
  }),
);
