// The chat: one conversation, kept in this page only. Talks to its own server through /v1/chat/completions.
import { fillCard, kindName, short } from "./card.js";
import { make, render } from "./render.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = ["What is 7 + 5?", "Who are you?", "Write a short poem about a ladder."];
const ICONS = {
  copy: "M7.5 7.5h8v8h-8zM4.5 12.5v-8h8", again: "M15.5 10a5.5 5.5 0 1 1-1.7-4M14 3v3.2h-3.2", done: "M4.5 10.5l3.5 3.5 7.5-8",
};
const WIDE = matchMedia("(min-width: 901px)");
let card = null;
let messages = []; // {role, content, note?, error?}
let running = null; // AbortController of the reply under way

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

// ---- asking the server ----

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  if (response.status === 401) { $("key-field").hidden = false; $("settings").open = true; }
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" || !Number.isFinite(Number(value)) ? undefined : Number(value);
}

/** The conversation for the model: exchanges in which it said nothing are left out, as user and assistant must take turns. */
function history() {
  const said = [];
  for (let i = 0; i < messages.length - 2; i += 2) if (messages[i + 1].content) said.push(messages[i], messages[i + 1]);
  return [...said, messages.at(-2)].map(({ role, content }) => ({ role, content }));
}

function body() {
  const system = $("system").value.trim();
  return JSON.stringify({
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history()], stream: true, truncate_history: true,
    stream_options: { include_usage: true }, temperature: number("temperature"), top_k: number("top-k"), max_tokens: number("max-tokens"), seed: number("seed"),
  });
}

/** Server-sent events of a reply, one parsed JSON object each. */
async function* events(signal) {
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: body(), signal });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection to the server was cut");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function answer() {
  const reply = { role: "assistant", content: "" };
  messages.push(reply);
  const controller = (running = new AbortController());
  const view = show();
  const started = performance.now();
  let tokens = 0, finish = null, dropped = 0;
  try {
    for await (const event of events(controller.signal)) {
      dropped = event.dropped_messages ?? dropped;
      const choice = event.choices[0];
      if (choice?.delta.content) {
        reply.content += choice.delta.content;
        draw(view, reply.content);
      }
      finish = choice?.finish_reason ?? finish;
      tokens = event.usage?.completion_tokens ?? tokens;
    }
    const seconds = (performance.now() - started) / 1000; // waiting included: what one person got
    reply.note = tokens === 1 ? "1 token" : `${tokens} tokens, ${short(tokens / seconds, 2)} per second`;
    if (finish === "length") reply.note += "; cut at the longest reply";
    if (reply.content === "") reply.note = "The model said nothing.";
  } catch (error) {
    if (controller.signal.aborted) reply.note = "stopped";
    else reply.error = error instanceof TypeError ? "The server cannot be reached." : `The reply failed: ${error.message}.`;
  }
  reply.dropped = dropped;
  if (running !== controller) return; // a new chat was begun meanwhile
  running = null;
  show();
  $("status").textContent = reply.error ?? (reply.note === "stopped" ? "Reply stopped." : `Reply: ${reply.content}`);
}

// ---- what is seen ----

let pending = null;
function draw(view, text) { // at most once a frame, however fast tokens come
  if (pending === null) requestAnimationFrame(() => { const f = pending; pending = null; f(); });
  pending = () => {
    if (!view.isConnected) return;
    const log = $("log");
    const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    render(view, text);
    if (follow) log.scrollTop = log.scrollHeight;
  };
}

async function copy(button, text) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission, or a page that is not on https or loopback
    const area = make("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
  }
  button.replaceChildren(icon(copied ? "done" : "copy"), copied ? "Copied" : "Not allowed");
  $("status").textContent = copied ? "Copied." : "Copying is not allowed here.";
  setTimeout(() => button.replaceChildren(icon("copy"), "Copy"), 1600);
}

function actions(message, last) {
  const row = make("div", { class: "actions" });
  if (message.content) row.append(make("button", { type: "button", class: "copy", onclick: (e) => copy(e.currentTarget, message.content) }, icon("copy"), "Copy"));
  if (last) row.append(make("button", { type: "button", class: "again", onclick: regenerate }, icon("again"), message.error ? "Try again" : "Regenerate"));
  if (message.note) row.append(make("span", {}, message.note));
  return row;
}

/** Everything anew; returns the element of the last message's text. */
function show() {
  const log = $("log");
  const elements = messages.map((message, i) => {
    const last = i === messages.length - 1;
    const text = make("div", { class: "text" });
    if (message.role === "user") text.textContent = message.content;
    else render(text, message.content);
    const busy = last && running !== null && message.role === "assistant";
    const who = message.role === "user" ? "You" : card?.id ?? "Model";
    const box = make("article", { class: `message ${message.role}${busy ? " streaming" : ""}`, "aria-label": who }, text);
    if (message.role === "assistant" && !busy) {
      if (message.error) box.append(make("p", { class: "error", role: "alert" }, message.error));
      box.append(actions(message, last));
      if (message.dropped) box.prepend(make("p", { class: "note" }, `The context is full: the first ${message.dropped} messages are no longer read.`));
    }
    return box;
  });
  log.replaceChildren(...(elements.length ? elements : [welcome()]));
  log.scrollTop = log.scrollHeight;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("send").disabled = $("input").value.trim() === "";
  return elements.at(-1)?.querySelector(".text");
}

function welcome() {
  const intro = card === null ? "" : card.kind === "base"
    ? "This model has read a corpus and was not fine-tuned on conversations: expect it to continue text rather than to answer."
    : `A model of ${short(card.params.total)} parameters${card.sft ? `, fine-tuned on ${card.sft.num_conversations.toLocaleString("en")} conversations` : ""}. What it says can be wrong.`;
  const examples = EXAMPLES.map((text) => make("button", { type: "button", onclick: () => send(text) }, text));
  return make("div", { class: "welcome" }, make("h2", {}, `Talk to ${card?.id ?? "the model"}`), make("p", {}, intro), make("div", { class: "examples" }, ...examples));
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  $("send").disabled = input.value.trim() === "";
}

// ---- what one can do ----

function send(text) {
  if (running !== null || text.trim() === "") return;
  messages.push({ role: "user", content: text.trim() });
  $("input").value = "";
  grow();
  answer();
}

function regenerate() {
  if (running !== null) return;
  messages.pop();
  answer();
  $("input").focus({ preventScroll: true });
}

function stop() { running?.abort(); }

function newChat() {
  const under = running;
  running = null;
  under?.abort();
  messages = [];
  show();
  $("status").textContent = "New chat.";
  $("input").focus();
}

function toggleCard(open = $("card").hidden) {
  $("card").hidden = !open;
  $("card-button").setAttribute("aria-expanded", String(open));
  if (open && !WIDE.matches) $("card").querySelector("button")?.focus();
  else if (!open) $("card-button").focus();
}

function setTheme(theme) { document.documentElement.dataset.theme = theme; }

async function loadCard() {
  const response = await fetch("card.json", { headers: headers() });
  if (!response.ok) throw await failure(response);
  card = await response.json();
  document.title = card.id;
  $("name").textContent = card.id;
  $("tagline").textContent = `${short(card.params.total)} parameters, ${kindName(card)}`;
  $("max-tokens").max = card.serving.max_reply_tokens;
  $("max-tokens").value = Math.min(256, card.serving.max_reply_tokens, card.serving.max_tokens);
  $("caveat").textContent = "Replies can be wrong.";
  fillCard($("card"), card, () => toggleCard(false));
  if (!messages.length) show();
}

function begin() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", (e) => setTheme(e.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  $("form").addEventListener("submit", (e) => { e.preventDefault(); send($("input").value); });
  $("input").addEventListener("input", grow);
  $("input").addEventListener("keydown", (e) => {
    if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send($("input").value); }
  });
  document.addEventListener("keydown", (e) => {
    if (e.key !== "Escape") return;
    if (running !== null) stop();
    else if (!$("card").hidden) toggleCard(false);
  });
  $("settings").addEventListener("toggle", () => { $("log").scrollTop = $("log").scrollHeight; }); // it takes room from the end
  $("stop").addEventListener("click", () => { stop(); $("input").focus(); });
  $("new").addEventListener("click", newChat);
  $("card-button").addEventListener("click", () => toggleCard());
  const readCard = () => loadCard().catch((error) => {
    if (!messages.length) $("log").replaceChildren(make("p", { class: "error", role: "alert" }, `${error.message}.`));
  });
  $("key").addEventListener("change", readCard);
  show();
  readCard().then(() => { document.documentElement.dataset.ready = "true"; });
  if (WIDE.matches) $("input").focus();
}

begin();
