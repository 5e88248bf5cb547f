// The model card: losses predicted and measured, the curve, the laws, what the model is.
import { make } from "./render.js";

const SVG = "http://www.w3.org/2000/svg";
const LOSS = "bits per byte";

export function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= limit && Math.abs(value) < 1e15) return `${Number((value / limit).toPrecision(digits))}${letter}`;
  }
  return Math.abs(value) >= 1e15 ? value.toExponential(digits - 1).replace("e+", "e") : String(Number(value.toPrecision(digits)));
}

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function table(rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make("table", {}, make("tbody", {}, ...shown.map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", {}, String(value))))));
}

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Validation loss over tokens, with the interval that was predicted for the end. */
function curve(points, prediction) {
  const width = 336, height = 190, left = 34, right = 12, top = 10, bottom = 26;
  const xs = points.map((p) => p.num_tokens);
  const ys = points.map((p) => p.val_bpb);
  if (prediction) ys.push(prediction.predicted, prediction.low ?? prediction.predicted, prediction.high ?? prediction.predicted);
  const x0 = 0, x1 = Math.max(...xs), y0 = Math.min(...ys), y1 = Math.max(...ys), pad = (y1 - y0 || 0.1) * 0.08;
  const x = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (v) => top + ((y1 + pad - v) / (y1 - y0 + 2 * pad)) * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "curve", role: "img", "aria-label":
    `Validation loss over tokens: from ${ys[0].toFixed(3)} to ${points.at(-1).val_bpb.toFixed(3)} ${LOSS} after ${short(x1)} tokens` });
  for (const value of [y0, (y0 + y1) / 2, y1]) {
    svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)));
  }
  svg.append(draw("text", { x: left, y: height - 6 }, "0"));
  svg.append(draw("text", { x: width - right, y: height - 6, "text-anchor": "end" }, `${short(x1)} tokens`));
  svg.append(draw("polyline", { class: "line", points: points.map((p) => `${x(p.num_tokens)},${y(p.val_bpb)}`).join(" ") }));
  if (prediction) {
    if (prediction.low !== null && prediction.high !== null) {
      svg.append(draw("line", { class: "band", x1: x(x1), x2: x(x1), y1: y(prediction.low), y2: y(prediction.high) }));
    }
    svg.append(draw("circle", { class: "guess", cx: x(x1), cy: y(prediction.predicted), r: 4 }));
  }
  const last = points.at(-1);
  svg.append(draw("circle", { class: "dot", cx: x(last.num_tokens), cy: y(last.val_bpb), r: 3.5 }));
  return svg;
}

function losses(card) {
  const measured = card.pretraining?.val_bpb;
  const p = card.prediction;
  const items = [];
  if (p) {
    const range = p.low !== null && p.high !== null ? `${p.low.toFixed(3)} to ${p.high.toFixed(3)}` : "no interval";
    items.push(make("div", {}, make("dt", {}, "Predicted"), make("dd", {}, p.predicted.toFixed(4)), make("dd", {}, range)));
  }
  if (measured !== null && measured !== undefined) {
    items.push(make("div", {}, make("dt", {}, "Measured"), make("dd", { class: "measured" }, measured.toFixed(4)), make("dd", {}, `validation ${LOSS}`)));
  }
  return items.length ? make("dl", { class: "loss" }, ...items) : null;
}

function verdict(p) {
  if (!p || p.inside === null) return null;
  const off = `${p.measured > p.predicted ? "+" : ""}${(100 * (p.measured / p.predicted - 1)).toFixed(1)}%`.replace("-", "−");
  const where = p.inside ? "inside the interval: the laws hold here" : `${p.measured < p.low ? "better" : "worse"} than the interval`;
  return make("p", { class: "verdict" }, `${off} against the prediction, ${where}.`);
}

function laws(p) {
  if (!p?.uses?.length) return [];
  const rows = p.uses.map((u) => make("li", {}, make("b", {}, u.quantity.replaceAll("_", " ")), make("span", {}, `${u.kind} (${u.status.replaceAll("_", " ")}): ${u.source}`)));
  const doubts = (p.reasons ?? []).map((r) => make("li", {}, make("span", {}, r)));
  return [make("h3", {}, "Laws and rules it came from"), make("ul", {}, ...rows),
    ...(doubts.length ? [make("h3", {}, "Doubts stated beforehand"), make("ul", {}, ...doubts)] : [])];
}

export function kindName(card) {
  return { base: "base model, not fine-tuned for chat", sft: "fine-tuned for chat", imported: "imported" }[card.kind] ?? card.kind;
}

export function fillCard(target, card, close) {
  const m = card.model, t = card.pretraining, s = card.sft, serving = card.serving;
  const x = make("button", { type: "button", "aria-label": "Close the model card", onclick: close });
  x.append(draw("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }));
  x.firstChild.append(draw("path", { d: "M5 5l10 10M15 5L5 15" }));
  const groups = Object.entries(card.params).filter(([k]) => !["total", "scaling"].includes(k));
  target.replaceChildren(
    ...[
      make("div", { class: "top" }, make("div", {}, make("h2", {}, card.id), make("p", {}, kindName(card))), x),
      losses(card), verdict(card.prediction),
      card.curve.length > 1 ? make("h3", {}, "Validation loss while training") : null,
      card.curve.length > 1 ? curve(card.curve, card.prediction) : null,
      card.curve.length > 1 && card.prediction ? make("p", { class: "legend" }, "In amber what was predicted for the end, with its interval.") : null,
      make("h3", {}, "Model"),
      table([["parameters", short(card.params.total)], ["counted by the laws", short(card.params.scaling)], ["layers × width", `${m.depth} × ${m.model_dim}`],
        ["heads (kv heads)", `${m.num_heads} (${m.num_kv_heads})`], ["context", `${short(m.sequence_len, 4)} tokens`], ["vocabulary", m.vocab_size],
        ["attention windows", m.window_pattern], ...groups.map(([k, v]) => [k.replaceAll("_", " "), short(v)])]),
      t ? make("h3", {}, "Pretraining") : null,
      t ? table([["run", t.run_id], ["state", t.status], ["tokens", t.num_tokens && short(t.num_tokens)], ["FLOPs", t.train_flops && short(t.train_flops)],
        ["CORE", t.core?.toFixed(4)], ["time", t.train_seconds && duration(t.train_seconds)], ["device", t.device], ["MFU", t.mfu && `${(100 * t.mfu).toFixed(1)}%`],
        ["finished", t.finished_at?.slice(0, 10)]]) : null,
      s ? make("h3", {}, "Fine-tuning") : null,
      s ? table([["conversations", s.num_conversations], ["steps", s.num_steps], ["held-out loss before", s.val_loss_before?.toFixed(3)],
        ["held-out loss after", s.val_loss_after?.toFixed(3)]]) : null,
      ...laws(card.prediction),
      make("h3", {}, "This server"),
      table([["replies at once", serving.max_rows], ["context here", `${serving.max_tokens} tokens`], ["device", `${serving.device}, ${serving.dtype}`], ["checkpoint", card.hash]]),
    ].filter((e) => e !== null),
  );
}
