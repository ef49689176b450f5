// The page: asks for the cluster every second and draws it; the playground is in play.js, scaling in scaling.js.
// Text from outside is only ever set as text (never as HTML), and the content security policy allows nothing inline.
import { setUpPlayground } from "/ui/play.js";
import { setUpScaling } from "/ui/scaling.js";

const LOOK_MS = 1000, KEPT = 60;
export const PATIENCE_MS = 4000;
export const $ = (id) => document.getElementById(id);

export function el(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  return made;
}

const number = (n) => n >= 1e6 ? `${(n / 1e6).toFixed(1)}M` : n >= 1e4 ? `${(n / 1e3).toFixed(1)}k` : `${Math.round(n)}`;
export const ms = (n) => n >= 9995 ? `${(n / 1e3).toFixed(1)} s` : n >= 100 ? `${Math.round(n)} ms` : `${n.toFixed(1)} ms`;
const uptime = (s) => s >= 7200 ? `${Math.floor(s / 3600)} h` : s >= 120 ? `${Math.floor(s / 60)} min` : `${Math.round(s)} s`;

// Keeps one element for each item, so that what is open or selected stays so.
export function keyed(container, items, key, create, update) {
  const known = new Map([...container.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, i) => {
    const name = key(item);
    let child = known.get(name);
    known.delete(name);
    if (!child) {
      child = create(item);
      child.dataset.key = name;
    }
    if (container.children[i] !== child) container.insertBefore(child, container.children[i] ?? null);
    update(child, item);
  });
  for (const child of known.values()) child.remove();
}

function setBar(bar, parts, whole) {
  keyed(bar, parts.filter((p) => p.size > 0), (p) => p.name, (p) => el("span", p.name), (span, p) => {
    span.style.width = `${Math.min(100, 100 * p.size / Math.max(whole, 1e-9))}%`;
    span.title = p.title;
  });
}

// Totals.

function drawTotals(router) {
  const totals = [
    ["live now", number(router.live_requests)],
    ["requests", number(Number(router.requests_total))],
    ["failed", number(Number(router.errors_total)), Number(router.errors_total) > 0],
    ["refused", number(Number(router.refused_total)), Number(router.refused_total) > 0],
    ["recoveries", number(Number(router.recoveries_total))],
    ["tokens", number(Number(router.tokens_total))],
    ["up", uptime(router.uptime_s)],
  ];
  keyed($("totals"), totals, (t) => t[0], (t) => {
    const div = el("div");
    div.append(el("dt", "", t[0]), el("dd"));
    return div;
  }, (div, t) => {
    div.lastChild.textContent = t[1];
    div.classList.toggle("bad", Boolean(t[2]));
  });
}

// Workers.

const history = new Map(); // worker id -> tokens per second, newest last
const STATES = { WORKER_STATE_CONNECTING: "connecting", WORKER_STATE_READY: "ready", WORKER_STATE_DRAINING: "draining", WORKER_STATE_LOST: "lost" };

function workerCard() {
  const card = el("article", "worker");
  const head = el("header");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 59 22");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  head.append(el("b"), el("span", "state"), svg);
  card.append(head, el("div", "bar"), el("p", "numbers"), el("p", "device"), el("p", "broken"));
  return card;
}

function drawWorker(card, w) {
  const load = w.load, prefill = w.role === "ROLE_PREFILL", state = STATES[w.state] ?? "unknown";
  const [head, bar, numbers, device, broken] = card.children;
  head.children[0].textContent = w.worker_id;
  head.children[1].textContent = state;
  head.children[1].className = `state ${state}`;
  const speed = prefill ? load.prefill_tokens_per_s : load.decode_tokens_per_s;
  const busy = state === "ready" && load.running_sequences + load.waiting_sequences > 0;
  const rate = busy ? speed : 0; // what it reports is its last rate, also when nothing runs
  const rates = history.get(w.worker_id) ?? [];
  rates.push(rate);
  if (rates.length > KEPT) rates.shift();
  history.set(w.worker_id, rates);
  const top = Math.max(1, ...rates);
  head.children[2].firstChild.setAttribute("points", rates.map((r, i) => `${KEPT - rates.length + i},${21 - 19 * r / top}`).join(" "));
  head.children[2].setAttribute("aria-label", `tokens per second over the last minute, now ${Math.round(rate)}`);

  const total = load.total_blocks, inUse = total - load.free_blocks;
  const held = Math.min(inUse, load.leased_blocks + load.quarantined_blocks);
  setBar(bar, [
    { name: "used", size: inUse - held, title: `${inUse - held} blocks in use` },
    { name: "leased", size: Math.min(held, load.leased_blocks), title: `${load.leased_blocks} blocks leased to a reader` },
    { name: "quarantined", size: load.quarantined_blocks, title: `${load.quarantined_blocks} blocks quarantined` },
    { name: "cached", size: Math.max(0, Math.min(load.free_blocks, load.cached_blocks - inUse)), title: `${load.cached_blocks} blocks hold findable content` },
  ], total);
  bar.title = `KV pool: ${inUse} of ${total} blocks in use`;
  const facts = [
    `${Math.round(100 * inUse / Math.max(1, total))} % KV`,
    `${load.running_sequences} running`,
    `${load.waiting_sequences} waiting`,
    ...(prefill || load.prefill_backlog_tokens ? [`${number(load.prefill_backlog_tokens)} tokens to read`] : []),
    `step ${load.step_ms.toFixed(1)} ms`,
    prefill ? `reads ${number(speed)} tok/s` : `${number(rate)} tok/s`,
  ];
  keyed(numbers, facts.map((text, i) => ({ text, i })), (f) => String(f.i), () => el("span"), (span, f) => { span.textContent = f.text; });
  device.textContent = [w.device, w.attention_backend, w.transport].filter(Boolean).join(" · ");
  broken.textContent = load.paths.filter((p) => p.state === "PATH_STATE_BROKEN")
    .map((p) => `path from ${p.source_worker} is broken: ${p.detail}`).join("; ");
  broken.hidden = !broken.textContent;
}

function drawPool(container, workers, role) {
  let empty = container.querySelector(".empty");
  const mine = workers.filter((w) => w.role === role).sort((a, b) => a.worker_id.localeCompare(b.worker_id));
  keyed(container, mine.length ? mine : [null], (w) => w ? `${w.worker_id}@${w.epoch}` : "-",
    (w) => w ? workerCard() : el("p", "empty", role === "ROLE_DECODE"
      ? "No worker has registered. Requests are refused until one is ready."
      : "No worker has registered. Everything runs on decode."),
    (card, w) => { if (w) drawWorker(card, w); });
}

// Requests.

const WHY = {
  pinned_local: "asked to run on decode alone",
  pinned_split: "asked to be split",
  short_on_decode: "short: decode computes it without delaying others",
  cached_on_decode: "most of it is cached on decode",
  split_is_faster: "splitting is estimated to be faster",
  keeps_decode_free: "splitting keeps decode free for running answers",
  local_is_faster: "decode alone is estimated to be faster",
  beside_its_prompt: "another answer to its prompt runs there",
};

function why(rule) {
  const [last, ...before] = rule.split(": ").reverse();
  return [...before.reverse(), WHY[last] ?? last.replaceAll("_", " ")].join(": ");
}

function phases(r) {
  const t = r.timings, running = r.outcome === "running", split = r.route.placement === "PLACEMENT_SPLIT";
  const total = running ? r.age_ms : t.total_ms;
  const prefill = t.ttft_ms > 0 ? t.ttft_ms - t.queue_ms : total - t.queue_ms;
  const after = t.ttft_ms > 0 ? Math.max(0, total - t.ttft_ms) : 0;
  const transfer = !split ? 0 : t.handoff_gap_ms > 0 ? Math.min(after, t.handoff_gap_ms) : running ? after : 0;
  return { total, parts: [
    { name: "queue", size: t.queue_ms, title: `queue ${ms(t.queue_ms)}` },
    { name: "prefill", size: prefill, title: `prefill ${ms(prefill)}` },
    { name: "transfer", size: transfer, title: `transfer: first token to second ${ms(transfer)}` },
    { name: "decode", size: after - transfer, title: `decode ${ms(after - transfer)}` },
  ] };
}

let mine = "";
export function markRequest(requestId) { mine = requestId; }

function requestRow() {
  const row = el("li"), details = el("details"), summary = el("summary"), line = el("div", "line");
  line.append(el("span", "route"), el("span", "why quiet"), el("span", "sizes quiet"), el("span", "outcome"), el("span", "time"));
  summary.append(line, el("div", "bar"));
  details.append(summary, el("div", "detail"));
  row.append(details);
  return row;
}

export function table(rows) {
  const made = el("table");
  for (const [name, value] of rows) {
    const tr = el("tr");
    tr.append(el("td", "quiet", name), el("td", "", value));
    made.append(tr);
  }
  return made;
}

function estimate(e) {
  const unit = e.name.endsWith("_ms") ? "ms" : e.name.endsWith("_tokens") ? "tokens" : "";
  const name = e.name.replace(/_(ms|tokens)$/, "").replaceAll("_", " ");
  return [name, `${Number.isInteger(e.value) ? e.value : e.value.toFixed(1)} ${unit}`];
}

function drawRequest(row, r, scale) {
  const { total, parts } = phases(r), split = r.route.placement === "PLACEMENT_SPLIT", details = row.firstChild;
  const [line, bar] = details.firstChild.children;
  const [route, reason, sizes, outcome, time] = line.children;
  route.textContent = split ? `${r.route.prefill_worker} → ${r.route.decode_worker}` : r.route.decode_worker;
  reason.textContent = why(r.route.rule);
  const cached = r.cached_tokens ? ` (${number(r.cached_tokens)} cached)` : "";
  const times = (n) => `${n} ${n > 1 ? "times" : "time"}`;
  const moved = (r.recoveries ? `, recovered ${times(r.recoveries)}` : "") + (r.migrations ? `, moved ${times(r.migrations)}` : "");
  sizes.textContent = `${number(r.prompt_tokens)} tokens in${cached}, ${number(r.completion_tokens)} out${moved}`;
  outcome.textContent = r.outcome;
  outcome.className = `outcome ${["stop", "length", "cancelled"].includes(r.outcome) ? "quiet" : r.outcome === "running" ? "running" : "bad"}`;
  time.textContent = ms(total);
  setBar(bar, parts, scale);
  row.classList.toggle("mine", r.request_id === mine);
  if (details.open) {
    const t = r.timings;
    details.lastChild.replaceChildren(
      table([["request", r.request_id], ["rule", r.route.rule], ...parts.filter((p) => p.size > 0).map((p) => [p.name, ms(p.size)]),
        ...(split ? [["KV there before prefill ended", `${Math.round(100 * t.kv_early_share)} %`], ["adopted after the last chunk", ms(t.adopt_ms)]] : [])]),
      table(r.route.estimates.map(estimate)),
    );
  }
}

function drawRequests(recent) {
  const longest = Math.max(1, ...recent.map((r) => phases(r).total));
  keyed($("requests"), recent, (r) => r.request_id, (r) => {
    const row = requestRow();
    row.firstChild.addEventListener("toggle", () => look());
    return row;
  }, (row, r) => drawRequest(row, r, longest));
  $("no-requests").hidden = recent.length > 0;
}

// Running answers that went on elsewhere, or are on their way.

function drawMigrations(migrations) {
  keyed($("migrations"), migrations.slice(0, 8).map((m, i) => ({ m, i })), (one) => String(one.i), () => el("li"), (item, { m }) => {
    const pause = m.pause_ms > 0 ? `, paused for ${ms(m.pause_ms)}` : "";
    item.textContent = `moved ${m.request_id}: ${m.source_worker} → ${m.target_worker}, ${m.reason}: ${m.outcome}${pause}`;
  });
}

// The API key, where the router asks for one.

export const authorization = () => {
  const key = sessionStorage.getItem("diptych-key");
  return key ? { authorization: `Bearer ${key}` } : {};
};

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("diptych-key", $("key").value.trim());
  look();
});

// A key that may ask, and may not see everybody's requests: only the playground is of use.
async function withoutCluster(why) {
  const response = await fetch("/v1/models", { headers: authorization(), signal: AbortSignal.timeout(PATIENCE_MS) });
  const model = response.ok ? (await response.json()).data[0].id : "";
  $("model").textContent = model;
  setState(Boolean(model), model ? "playground only" : "no access", "warn", why, model);
}

// The loop.

let seenAt = null, looking = false;
export const state = { serving: false, reason: "connecting", model: "" };
const listeners = [];
export function onState(listener) { listeners.push(listener); }

function setState(serving, pill, kind, reason, model = state.model) {
  Object.assign(state, { serving, reason, model });
  $("state").textContent = pill;
  $("state").className = `pill ${kind}`;
  $("notice").hidden = !reason;
  $("notice").className = `notice ${kind}`;
  $("notice").textContent = reason;
  for (const listener of listeners) listener(state);
}

export async function look() {
  if (looking) return;
  looking = true;
  try {
    const response = await fetch("/ui/cluster", {
      headers: authorization(), signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store",
    });
    const known = response.status !== 401 && response.status !== 403;
    $("key-form").hidden = known;
    for (const section of document.querySelectorAll("[data-cluster]")) section.hidden = !known;
    if (!known) {
      const why = (await response.json()).error.message;
      if (response.status === 403) await withoutCluster(why);
      else setState(false, "key needed", "warn", why);
      return;
    }
    if (!response.ok) throw new Error(`it answers with status ${response.status}`);
    const cluster = await response.json();
    seenAt = Date.now();
    const router = cluster.router;
    $("model").textContent = router.model;
    $("router").textContent = `router ${router.router_id} · context ${number(router.context_limit_tokens)} tokens`;
    drawTotals(router);
    drawPool($("prefill"), cluster.workers, "ROLE_PREFILL");
    drawPool($("decode"), cluster.workers, "ROLE_DECODE");
    $("standby-panel").hidden = !cluster.workers.some((w) => w.role === "ROLE_STANDBY");
    drawPool($("standby"), cluster.workers, "ROLE_STANDBY");
    drawRequests(cluster.recent);
    drawMigrations(cluster.migrations);
    if (router.serving) setState(true, "serving", "good", "", router.model);
    else setState(false, "not serving", "warn", `Not serving: ${router.not_serving_reason}.`, router.model);
  } catch (error) {
    const since = seenAt ? `What you see is from ${new Date(seenAt).toLocaleTimeString()}.` : "";
    setState(false, "unreachable", "bad", `The router does not answer (${error.message}). ${since} Trying again every second.`);
  } finally {
    looking = false;
  }
}

setUpPlayground();
setUpScaling();
setInterval(() => { if (!document.hidden) look(); }, LOOK_MS);
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
look();
