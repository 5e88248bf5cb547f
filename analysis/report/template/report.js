"use strict";
(function () {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const root = document.documentElement;
  const figures = read("data-figures"), twins = read("data-twins"), settings = read("data-settings");
  const plots = Array.from(document.querySelectorAll(".plot"));
  const NARROW = 520; // CSS pixels of a plot's own width
  const PAPER_WIDTH = 680, PAPER_HALF = 326; // A4 and Letter less their margins, in CSS pixels
  const touch = window.matchMedia("(pointer: coarse)").matches;

  /* Theme: what the reader chose here, else what the system prefers; paper is always light. */
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null, printing = false;
  const theme = () => (printing ? "light" : chosen || (system.matches ? "dark" : "light"));
  const button = document.getElementById("toggle");

  function applyTheme() {
    root.dataset.theme = theme();
    button.textContent = theme() === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", "Switch to " + button.textContent.toLowerCase() + " colours");
  }

  const hex = (n) => Number(n).toString(16).padStart(2, "0");
  function darkTwin(text) {
    const m = /^rgba\((\d+),(\d+),(\d+),([\d.]+)\)$/.exec(text);
    if (!m) return twins[text] || text;
    const twin = twins["#" + hex(m[1]) + hex(m[2]) + hex(m[3])];
    if (!twin) return text;
    const part = (i) => parseInt(twin.slice(i, i + 2), 16);
    return "rgba(" + part(1) + "," + part(3) + "," + part(5) + "," + m[4] + ")";
  }
  // A deep copy with colours of the theme. Typed arrays (bdata) and texts pass through as they are.
  function recolour(value, key) {
    if (typeof value === "string") return key !== "bdata" && (value[0] === "#" || value.startsWith("rgba")) ? darkTwin(value) : value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((v) => recolour(v, key));
    if (value && typeof value === "object") {
      const copy = {};
      for (const k in value) copy[k] = recolour(value[k], k);
      return copy;
    }
    return value;
  }
  const copy = (value) => JSON.parse(JSON.stringify(value));

  function spec(name, width) {
    const raw = figures[name];
    const made = theme() === "dark" ? recolour(raw, "") : copy(raw);
    const layout = made.layout;
    layout.autosize = true;
    if (width < NARROW) {
      layout.margin = Object.assign({}, layout.margin, { l: 50, r: 8 });
      layout.font.size = 11.5;
      if (layout.legend && layout.showlegend) layout.legend.font.size = 11;
      for (const k in layout) if (/^[xy]axis/.test(k)) thin(layout[k], 5);
      layout.annotations = (layout.annotations || []).filter((a) => a.name !== "wide");
    }
    if (touch) {
      layout.dragmode = false;
      for (const k in layout) if (/^[xy]axis/.test(k)) layout[k].fixedrange = true;
    }
    return made;
  }
  function thin(axis, most) {
    if (!axis.ticktext || axis.ticktext.length <= most) return;
    const every = Math.ceil(axis.ticktext.length / most);
    axis.ticktext = axis.ticktext.map((t, i) => (i % every ? "" : t));
  }

  const config = { responsive: false, displaylogo: false, displayModeBar: false, doubleClick: "reset", showTips: false };
  function draw(el) {
    const width = printing ? (el.closest(".pair, .triple") ? PAPER_HALF : PAPER_WIDTH) : el.clientWidth;
    const made = spec(el.dataset.figure, width);
    made.layout.width = width;
    el.dataset.width = width;
    return Plotly.react(el, made.data, made.layout, config);
  }
  function redraw(all) {
    for (const el of plots) if (all || Number(el.dataset.width) !== el.clientWidth) draw(el);
  }

  /* A click on a point opens its run: in MLflow where an address was given, else in the table below. */
  function runLink(id) {
    return settings.run_url ? settings.run_url.replaceAll("{run_id}", encodeURIComponent(id)) : null;
  }
  function openRun(id) {
    const url = runLink(id);
    if (url) { window.open(url, "_blank", "noopener"); return; }
    filter.value = id;
    sweepChoice.value = "";
    statusChoice.value = "";
    refresh();
    document.getElementById("runs").scrollIntoView();
  }
  function listen(el) {
    const idOf = (event) => {
      const data = event.points && event.points[0] && event.points[0].customdata;
      return Array.isArray(data) ? data[0] : data;
    };
    el.on("plotly_click", (event) => { const id = idOf(event); if (id) openRun(String(id)); });
    el.on("plotly_hover", (event) => el.classList.toggle("clickable", Boolean(idOf(event))));
    // Labelled ticks are made for the whole range; a zoomed axis gets plotly's own, a double click brings them back.
    el.on("plotly_relayout", (event) => {
      const change = {};
      for (const key in event) {
        const axis = /^([xy]axis\d*)\.range/.exec(key);
        if (axis && el.layout[axis[1]].tickmode === "array") change[axis[1] + ".tickmode"] = "auto";
      }
      if (Object.keys(change).length && !el.dataset.drawing) Plotly.relayout(el, change);
    });
    el.on("plotly_doubleclick", () => { setTimeout(() => draw(el), 0); });
    el.on("plotly_unhover", () => el.classList.remove("clickable"));
  }

  /* Runs: one array per column; a filtered, sorted index; rows are made as they are asked for. */
  const runs = read("data-runs"), PAGE = 50;
  const body = document.querySelector("#runs-table tbody"), head = document.querySelector("#runs-table thead tr");
  const filter = document.getElementById("filter"), sweepChoice = document.getElementById("by-sweep");
  const statusChoice = document.getElementById("by-status"), more = document.getElementById("more");
  const countText = document.getElementById("count");
  const column = Object.fromEntries(runs.columns.map((c) => [c.key, c]));
  const cell = (c, i) => (c.levels ? c.levels[c.values[i]] : c.values[i]);
  let sortKey = null, ascending = true, index = [], shown = PAGE;

  const UNITS = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
  const digits = (v, n) => Number(v.toPrecision(n)).toLocaleString("en-US", { maximumSignificantDigits: n });
  const SUPER = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const FORMAT = {
    text: (v) => (v === null ? "" : String(v)),
    count: (v) => { for (const [u, s] of UNITS) if (v >= u) return digits(v / u, 3) + s; return digits(v, 3); },
    flops: (v) => {
      const [m, e] = v.toExponential(2).split("e");
      const power = String(Number(e)).replace(/[0-9]/g, (d) => SUPER[d]).replace("-", "⁻");
      return Number(m) === 1 ? "10" + power : Number(m) + "×10" + power;
    },
    whole: (v) => Math.round(v).toLocaleString("en-US"),
    loss: (v) => v.toFixed(4),
    plain: (v) => (Math.abs(v) >= 1e-4 || v === 0 ? digits(v, 3) : v.toExponential(1)),
    seconds: (v) => (v < 60 ? digits(v, 2) + " s" : v < 3600 ? (v / 60).toFixed(1) + " min" : v < 172800 ? (v / 3600).toFixed(1) + " h" : (v / 86400).toFixed(1) + " d"),
  };
  function refresh(keep) {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const texts = runs.columns.filter((c) => c.kind === "text");
    const wantSweep = sweepChoice.value, wantStatus = statusChoice.value;
    index = [];
    for (let i = 0; i < runs.length; i++) {
      if (wantSweep && cell(column.sweep, i) !== wantSweep) continue;
      if (wantStatus && cell(column.use, i) !== wantStatus) continue;
      if (words.length) {
        const line = texts.map((c) => cell(c, i) || "").join(" ").toLowerCase();
        if (!words.every((w) => line.includes(w))) continue;
      }
      index.push(i);
    }
    if (sortKey) {
      const c = column[sortKey], sign = ascending ? 1 : -1;
      index.sort((a, b) => {
        const x = cell(c, a), y = cell(c, b);
        if (x === null || x === "") return y === null || y === "" ? a - b : 1;
        if (y === null || y === "") return -1;
        return (x < y ? -1 : x > y ? 1 : 0) * sign || a - b;
      });
    }
    if (!keep) shown = PAGE;
    body.replaceChildren(...index.slice(0, shown).map(row));
    const visible = Math.min(shown, index.length);
    countText.textContent = visible.toLocaleString("en-US") + " of " + index.length.toLocaleString("en-US") +
      (index.length < runs.length ? " matching (" + runs.length.toLocaleString("en-US") + " in all)" : " runs");
    more.hidden = visible >= index.length;
  }
  function row(i) {
    const tr = document.createElement("tr");
    for (const c of runs.columns) {
      const td = document.createElement("td"), value = cell(c, i);
      if (c.kind !== "text") td.className = "n";
      const text = value === null || value === undefined ? "" : FORMAT[c.kind](value);
      if (c.key === "run_id") {
        const url = runLink(text), holder = document.createElement(url ? "a" : "span");
        holder.className = "mono";
        holder.textContent = text;
        if (url) { holder.href = url; holder.target = "_blank"; holder.rel = "noopener noreferrer"; }
        td.append(holder);
      } else td.textContent = text;
      tr.append(td);
    }
    return tr;
  }
  function makeHead() {
    for (const c of runs.columns) {
      const th = document.createElement("th"), b = document.createElement("button");
      b.type = "button";
      b.textContent = c.title;
      if (c.kind !== "text") th.className = "n";
      th.scope = "col";
      b.addEventListener("click", () => {
        ascending = sortKey === c.key ? !ascending : true;
        sortKey = c.key;
        for (const other of head.children) other.removeAttribute("aria-sort");
        th.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        refresh();
      });
      th.append(b);
      head.append(th);
    }
    for (const [select, key] of [[sweepChoice, "sweep"], [statusChoice, "use"]]) {
      const levels = column[key] ? column[key].levels.filter(Boolean) : [];
      for (const name of levels) select.append(new Option(name, name));
      select.closest("label").hidden = levels.length < 2;
    }
  }

  function contents() {
    const links = new Map(Array.from(document.querySelectorAll(".toc a"), (a) => [a.hash.slice(1), a]));
    const seen = new IntersectionObserver((entries) => {
      for (const e of entries) if (e.isIntersecting && links.has(e.target.id)) {
        for (const a of links.values()) a.classList.remove("here");
        links.get(e.target.id).classList.add("here");
      }
    }, { rootMargin: "-8% 0px -78% 0px" });
    document.querySelectorAll("main > section[id]").forEach((s) => seen.observe(s));
  }

  applyTheme();
  button.addEventListener("click", () => { chosen = theme() === "dark" ? "light" : "dark"; applyTheme(); redraw(true); });
  system.addEventListener("change", () => { applyTheme(); redraw(true); });
  makeHead();
  refresh();
  filter.addEventListener("input", () => refresh());
  sweepChoice.addEventListener("change", () => refresh());
  statusChoice.addEventListener("change", () => refresh());
  more.addEventListener("click", () => { shown += shown < 1000 ? 200 : 1000; refresh(true); });
  contents();
  Promise.all(plots.map(draw)).then(() => {
    plots.forEach(listen);
    root.dataset.ready = "true";
  });

  let pending = 0;
  window.addEventListener("resize", () => { clearTimeout(pending); pending = setTimeout(() => { if (!printing) redraw(false); }, 120); });
  let closed = [];
  window.addEventListener("beforeprint", () => {
    printing = true;
    applyTheme();
    closed = Array.from(document.querySelectorAll("details:not([open])"));
    closed.forEach((d) => { d.open = true; });
    redraw(true);
  });
  window.addEventListener("afterprint", () => { printing = false; applyTheme(); closed.forEach((d) => { d.open = false; }); redraw(true); });
})();
