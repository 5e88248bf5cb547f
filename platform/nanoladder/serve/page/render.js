// Text of a reply as elements: paragraphs, headings, fenced and inline code, bold, and calculator calls. Nothing is ever parsed as HTML:
// every character of the model ends in a text node.

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|<\|python_start\|>([\s\S]*?)<\|python_end\|>(?:<\|output_start\|>([\s\S]*?)<\|output_end\|>)?/g;
const HEADING = /^#{1,6} +(?=\S)/; // "#### 55" is also how a model marks its final answer

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((c) => c !== null && c !== undefined));
  return element;
}

function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(end, match.index));
    if (match[1] !== undefined) parts.push(make("code", {}, match[1]));
    else if (match[2] !== undefined) parts.push(make("strong", {}, match[2]));
    else parts.push(make("span", { class: "call", title: "computed by the calculator" }, match[4] === undefined ? match[3] : `${match[3]} = ${match[4]}`));
    end = match.index + match[0].length;
  }
  parts.push(text.slice(end));
  return parts.filter((p) => p !== "");
}

function prose(text) {
  return text.split(/\n{2,}/).filter((p) => p.trim() !== "").map((p) => make("p", {}, ...inline(p.replace(/^\n+|\n+$/g, ""))));
}

/** Fill `target` with `text`. A fence that is still open while text streams in counts as code. */
export function render(target, text) {
  const blocks = [];
  const lines = text.split("\n");
  let plain = [];
  let code = null;
  const flush = () => { blocks.push(...prose(plain.join("\n"))); plain = []; };
  for (const line of lines) {
    const fence = /^\s*```/.test(line);
    if (fence && code === null) { flush(); code = []; }
    else if (fence) { blocks.push(make("pre", { tabindex: "0" }, make("code", {}, code.join("\n")))); code = null; }
    else if (code === null && HEADING.test(line)) {
      flush();
      blocks.push(make("p", {}, make("strong", {}, ...inline(line.replace(HEADING, "")))));
    } else (code ?? plain).push(line);
  }
  if (code !== null) blocks.push(make("pre", { tabindex: "0" }, make("code", {}, code.join("\n"))));
  else flush();
  target.replaceChildren(...blocks);
}
