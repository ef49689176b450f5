// The page's part on scaling: wanted and present workers of each pool over time, and the last decisions with reasons.
// Hidden while nobody decides. Asked for every five seconds: decisions come no faster.
import { $, authorization, el, keyed, table, PATIENCE_MS } from "/ui/page.js";

const LOOK_MS = 5000, WIDE = 300, HIGH = 60, LEAST_MS = 60_000;
const SVG = "http://www.w3.org/2000/svg";
const OUTCOMES = {
  SCALING_OUTCOME_DRY_RUN: "dry run", SCALING_OUTCOME_UNCHANGED: "", SCALING_OUTCOME_APPLIED: "applied", SCALING_OUTCOME_FAILED: "failed",
};
const rounded = (n) => n === Infinity ? "∞" : Math.abs(n) >= 100 ? `${Math.round(n)}` : `${+n.toFixed(2)}`;
const span = (s) => s >= 5400 ? `${Math.round(s / 3600)} h` : s >= 90 ? `${Math.round(s / 60)} min` : `${Math.round(s)} s`;

// Counts over time.

function chart(role) {
  const figure = el("figure", `panel ${role}`), svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDE} ${HIGH}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  for (const name of ["present", "wanted"]) {
    const line = document.createElementNS(SVG, "polyline");
    line.setAttribute("class", name);
    svg.append(line);
  }
  figure.append(el("figcaption"), svg);
  return figure;
}

// A count holds until the next one is known.
function steps(points, value, longest, most) {
  const x = (ageMs) => WIDE * (1 - ageMs / longest), y = (count) => HIGH - 3 - (HIGH - 8) * count / most;
  const drawn = [];
  points.forEach((p, i) => {
    if (i > 0) drawn.push([x(p.age_ms), y(value(points[i - 1]))]);
    drawn.push([x(p.age_ms), y(value(p))]);
  });
  if (points.length) drawn.push([WIDE, y(value(points.at(-1)))]);
  return drawn.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" ");
}

function drawCharts(points, current) {
  const longest = Math.max(LEAST_MS, ...points.map((p) => p.age_ms));
  const counts = points.flatMap((p) => [p.wanted.prefill, p.wanted.decode, p.ready.prefill, p.ready.decode]);
  const most = Math.max(1, ...counts);
  keyed($("scaling-charts"), ["prefill", "decode"], (role) => role, chart, (figure, role) => {
    const [caption, svg] = figure.children, words = `${current.after[role]} wanted, ${current.ready[role]} present`;
    caption.textContent = `${role[0].toUpperCase()}${role.slice(1)}: ${words}`;
    svg.children[0].setAttribute("points", steps(points, (p) => p.ready[role], longest, most));
    svg.children[1].setAttribute("points", steps(points, (p) => p.wanted[role], longest, most));
    svg.setAttribute("aria-label", `${role} workers over the last ${span(longest / 1e3)}: ${words}`);
  });
}

// Decisions.

function decisionRow() {
  const row = el("li"), details = el("details"), summary = el("summary"), line = el("div", "line");
  line.append(el("span", "route"), el("span", "rule"), el("span", "outcome"), el("span", "time quiet"));
  summary.append(line, el("div", "why quiet"), el("div", "error"));
  details.append(summary, el("div", "detail"));
  row.append(details);
  return row;
}

function drawDecision(row, d) {
  const [summary, detail] = row.firstChild.children, [line, why, error] = summary.children;
  const pair = (counts) => `${counts.prefill} + ${counts.decode}`;
  const moved = d.before.prefill !== d.after.prefill || d.before.decode !== d.after.decode;
  line.children[0].textContent = moved ? `${pair(d.before)} → ${pair(d.after)}` : pair(d.after);
  line.children[1].textContent = d.rule.replaceAll("_", " ");
  line.children[2].textContent = OUTCOMES[d.outcome] ?? "";
  line.children[2].className = d.error ? "outcome bad" : "outcome";
  line.children[3].textContent = `${span(d.age_ms / 1e3)} ago`;
  why.textContent = d.reason;
  error.textContent = d.error;
  error.hidden = !d.error;
  if (detail.childElementCount) return;
  const numbers = Object.entries(d.numbers).sort(([a], [b]) => a.localeCompare(b));
  detail.append(
    table(numbers.map(([name, value]) => [name.replaceAll("_", " "), rounded(value)])),
    table(d.alternatives.map((a) => [
      `${pair(a)}, ${a.what}: ${a.verdict}`,
      `${rounded(Number(a.prefill_strain))} / ${rounded(Number(a.decode_strain))}`,
    ])),
  );
}

function draw(told) {
  const current = told.current;
  $("scaling").hidden = !current;
  if (!current) return;
  const gpus = current.numbers.budget_gpus === undefined ? ""
    : ` ${rounded(current.numbers.held_gpus)} of ${rounded(current.numbers.budget_gpus)} GPUs held.`;
  const only = current.outcome === "SCALING_OUTCOME_DRY_RUN" ? " Dry run: only said, not done." : "";
  $("scaling-by").textContent = `Decided by ${current.decider}, last ${span(current.age_ms / 1e3)} ago.${gpus}${only}`;
  drawCharts(told.points, current);
  const same = (d) => d.decider === current.decider && d.number === current.number;
  const shown = [current, ...told.decisions.filter((d) => !same(d))];
  keyed($("scaling-decisions"), shown, (d) => `${d.decider}/${d.number}`, decisionRow, drawDecision);
}

let looking = false;
async function look() {
  if (looking) return;
  looking = true;
  try {
    const response = await fetch("/ui/scaling", {
      headers: authorization(), signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store",
    });
    if (response.ok) draw(await response.json());
    else $("scaling").hidden = true; // without an admin key: the page says so above
  } catch {
    // What was seen last stays; that the router does not answer is said above.
  } finally {
    looking = false;
  }
}

export function setUpScaling() {
  setInterval(() => { if (!document.hidden) look(); }, LOOK_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  $("key-form").addEventListener("submit", look);
  look();
}
