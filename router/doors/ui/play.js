// The playground: one request over the OpenAI API, drawn token by token as it comes.
import { $, authorization, el, look, markRequest, ms, onState } from "/ui/page.js";

let running = null; // its AbortController

// Server-sent events of one response, as the JSON of their data.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trim()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function request(model) {
  const chat = $("kind").value === "chat", prompt = $("prompt").value;
  const shared = {
    model,
    max_tokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  return chat
    ? ["/v1/chat/completions", { ...shared, messages: [{ role: "user", content: prompt }] }]
    : ["/v1/completions", { ...shared, prompt }];
}

// A stroke for each piece of text, on an axis from the request to now: the first text, the gap behind it, the rhythm.
class Ticks {
  constructor(box) {
    this.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.svg.setAttribute("preserveAspectRatio", "none");
    box.replaceChildren(this.svg);
    box.hidden = false;
  }

  add(at) {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of [["x1", at], ["x2", at], ["y1", 0], ["y2", 10]]) line.setAttribute(name, value);
    this.svg.append(line);
    this.svg.setAttribute("viewBox", `0 0 ${at * 1.002 + 1} 10`);
  }
}

async function send(model) {
  const [path, body] = request(model), answer = $("answer"), began = performance.now();
  running = new AbortController();
  answer.replaceChildren();
  answer.hidden = false;
  $("facts").hidden = false;
  $("facts").textContent = "waiting for the first token";
  $("send").hidden = true;
  $("stop").hidden = false;
  const ticks = new Ticks($("ticks"));
  let firstMs = 0, usage = null, ending = "";
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { ...authorization(), "content-type": "application/json", "x-diptych-placement": $("placement").value },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    markRequest(response.headers.get("x-request-id") ?? "");
    if (!response.ok) throw new Error((await response.json()).error?.message ?? `status ${response.status}`);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      ending = choice?.finish_reason ?? ending;
      if (!text) continue;
      const at = performance.now() - began;
      firstMs = firstMs || at;
      ticks.add(at);
      answer.append(el("span", "new", text));
      answer.scrollTop = answer.scrollHeight;
      $("facts").textContent = `first text after ${ms(firstMs)}`;
    }
    const took = performance.now() - began, tokens = usage?.completion_tokens ?? 0;
    const rate = tokens > 1 ? `, then ${((tokens - 1) / Math.max(1, took - firstMs) * 1e3).toFixed(1)} tokens/s` : "";
    $("facts").textContent = `first text after ${ms(firstMs)}${rate} · ${tokens} tokens, ${ms(took)} · ended by ${ending || "nothing"}`;
  } catch (error) {
    if (error.name === "AbortError") $("facts").textContent = "stopped";
    else {
      answer.append(el("p", "bad", error.message));
      $("facts").textContent = "";
    }
  } finally {
    running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    look();
  }
}

export function setUpPlayground() {
  let model = "";
  onState((state) => {
    model = state.model;
    $("send").disabled = !state.serving;
    $("send").title = state.reason;
  });
  $("send").disabled = true;
  $("play").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) send(model);
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("play").requestSubmit();
  });
}
