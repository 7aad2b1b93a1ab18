// The page of `s2ft serve`: the same message to several adapters at once, and what each of them trains.

const $ = (id) => document.getElementById(id);
const histories = new Map(); // column → its conversation
let base = "";
let stopping = null; // ends what is under way

// ---- asking the server

async function ask(path, options = {}) {
  const key = $("key").value;
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) $("key-label").hidden = false;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answers ${response.status}`);
}

async function* chunks(body, signal) {
  const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// ---- who answers

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function weights() {
  const found = {};
  for (const slider of $("weights").querySelectorAll("input")) {
    if (Number(slider.value) !== 0) found[slider.name] = Number(slider.value);
  }
  return found;
}

function columns() {
  const chosen = [...$("choices").querySelectorAll("input:checked")].map((box) => ({ title: box.value, model: box.value }));
  const fuse = weights();
  if ($("fuse").checked && Object.keys(fuse).length) {
    const title = Object.entries(fuse).map(([name, weight]) => `${weight} × ${name}`).join(" + ");
    chosen.push({ title, model: base, fuse });
  }
  return chosen;
}

function slider(name) {
  const shown = make("output", { textContent: "0.50" });
  const input = make("input", { type: "range", name, min: -1, max: 2, step: 0.05, value: 0.5 });
  input.addEventListener("input", () => {
    shown.textContent = Number(input.value).toFixed(2);
    $("fuse").checked = true;
  });
  return make("label", {}, make("span", { textContent: name }), input, shown);
}

async function load() {
  const { data } = await (await ask("/v1/models")).json();
  base = data.find((model) => model.parent === null).id;
  const adapters = data.filter((model) => model.parent !== null).map((model) => model.id);
  const few = new Set([base, ...adapters.slice(0, 3)]);
  $("choices").replaceChildren(...[base, ...adapters].map((name) =>
    make("label", {}, make("input", { type: "checkbox", value: name, checked: few.has(name) }), ` ${name}`)));
  $("weights").replaceChildren(...adapters.map(slider));
  $("fusion").hidden = $("picture").hidden = adapters.length === 0;
  $("first").replaceChildren(...adapters.map((name) => new Option(name)));
  $("second").replaceChildren(new Option("nothing", ""), ...adapters.map((name) => new Option(name)));
  $("second").selectedIndex = Math.min(2, adapters.length);
  $("key-label").hidden = !$("key").value;
  $("status").textContent = `${base}, with ${adapters.length} adapters`;
  if (adapters.length) await draw();
}

// ---- a message and its answers

function card(column, text) {
  const answer = make("div", { ariaLive: "polite" });
  const numbers = make("p", { className: "numbers" });
  const earlier = (histories.get(column.title) ?? []).map((turn) =>
    make("div", { className: turn.role === "user" ? "asked" : "", textContent: turn.content }));
  const asked = make("div", { className: "asked", textContent: text });
  const article = make("article", {}, make("h3", { textContent: column.title }), ...earlier, asked, answer, numbers);
  return { article, answer, numbers };
}

async function answered(column, text, view, signal) {
  const history = histories.get(column.title) ?? [];
  const messages = [...history, { role: "user", content: text }];
  const body = {
    model: column.model, messages, stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value), max_tokens: Number($("limit").value),
    ...(column.fuse && { fuse: column.fuse }),
  };
  const start = performance.now();
  let said = "";
  try {
    for await (const chunk of chunks(body, signal)) {
      said += chunk.choices[0]?.delta?.content ?? "";
      view.answer.textContent = said;
      if (chunk.usage) {
        const tokens = chunk.usage.completion_tokens;
        const speed = tokens / ((performance.now() - start) / 1000);
        view.numbers.textContent = `${tokens} tokens, ${speed.toFixed(0)} a second`;
        view.tokens = tokens;
      }
    }
    histories.set(column.title, [...messages, { role: "assistant", content: said }]);
  } catch (error) {
    view.numbers.classList.add("failed");
    view.numbers.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  return said;
}

async function send() {
  const text = $("prompt").value.trim();
  const asked = columns();
  if (!text || !asked.length || stopping) return;
  stopping = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  try {
    await answer(asked, text, stopping.signal);
  } finally {
    stopping = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    $("prompt").select();
  }
}

async function answer(asked, text, signal) {
  const views = asked.map((column) => card(column, text));
  $("answers").replaceChildren(...views.map((view) => view.article));
  const watching = await watch();
  const start = performance.now();
  const said = await Promise.all(asked.map((column, i) => answered(column, text, views[i], signal)));
  views.forEach((view, i) => view.answer.classList.toggle("differs", said[i] !== said[0]));
  const seconds = (performance.now() - start) / 1000;
  const tokens = views.reduce((sum, view) => sum + (view.tokens ?? 0), 0);
  const rows = await watching();
  $("status").textContent = `${(tokens / seconds).toFixed(0)} tokens a second over all, ${rows.toFixed(1)} rows in the batch on average`;
}

async function measured() { // of the server's metrics: rows now, and rows and steps since it started
  const text = await (await ask("/metrics")).text();
  const value = (name) => Number(new RegExp(`^s2ft_${name} (.+)$`, "m").exec(text)?.[1] ?? 0);
  return { running: value("running"), rows: value("batch_rows_sum"), steps: value("batch_rows_count") };
}

async function watch() { // how many rows the server's batch has, while we wait
  const before = await measured();
  let ended = false;
  const look = async () => {
    const { running } = await measured();
    if (!ended) $("status").textContent = `${running} rows in the batch`;
  };
  const timer = setInterval(() => look().catch(() => {}), 200);
  return async () => {
    ended = true;
    clearInterval(timer);
    const after = await measured();
    return (after.rows - before.rows) / Math.max(1, after.steps - before.steps);
  };
}

// ---- the picture of channels

async function channels(name) {
  return name ? (await (await ask(`/v1/adapters/${encodeURIComponent(name)}/channels`)).json()).data : [];
}

async function draw() {
  const [first, second] = [$("first").value, $("second").value];
  const [ours, theirs] = await Promise.all([channels(first), channels(second)]);
  const rows = new Map();
  for (const [place, slices] of [[0, ours], [1, theirs]]) {
    for (const slice of slices) {
      const id = `${slice.module} ${slice.side}`;
      if (!rows.has(id)) rows.set(id, { ...slice, sides: [new Set(), new Set()] });
      rows.get(id).sides[place] = new Set(slice.channels);
    }
  }
  const found = [...rows.values()];
  paint(found);
  $("first-name").textContent = first;
  $("second-name").textContent = second;
  $("second-legend").hidden = !second;
  const count = (place) => found.reduce((sum, row) => sum + row.sides[place].size, 0);
  const shared = found.reduce((sum, row) => sum + [...row.sides[0]].filter((one) => row.sides[1].has(one)).length, 0);
  $("overlap").textContent = second
    ? `${first} trains ${count(0)} channels, ${second} ${count(1)}; ${shared} are shared.`
    : `${first} trains ${count(0)} channels in ${found.length} modules.`;
}

function paint(rows) {
  const canvas = $("map");
  const style = getComputedStyle(document.documentElement);
  const color = (name) => getComputedStyle(document.querySelector(`.${name}`)).color;
  const [first, second, both] = ["first", "second", "both"].map(color);
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.parentElement.clientWidth - 32;
  const names = Math.min(190, width * 0.4);
  const height = 16;
  canvas.style.height = `${rows.length * height}px`;
  canvas.width = width * ratio;
  canvas.height = rows.length * height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  rows.forEach((row, number) => {
    const top = number * height;
    const step = (width - names) / row.size;
    pen.fillStyle = getComputedStyle($("status")).color;
    pen.fillText(row.label, 0, top + height / 2, names - 8);
    pen.globalAlpha = 0.15;
    pen.fillRect(names, top + 2, width - names, height - 4);
    pen.globalAlpha = 1;
    const mark = (channel, from, tall) => pen.fillRect(names + channel * step, top + 2 + from, Math.max(step, 0.75), tall);
    const half = (height - 4) / 2;
    for (const [place, fill, from] of [[0, first, 0], [1, second, half]]) {
      pen.fillStyle = fill;
      row.sides[place].forEach((channel) => mark(channel, from, half));
    }
    pen.fillStyle = both;
    row.sides[0].forEach((channel) => row.sides[1].has(channel) && mark(channel, 0, 2 * half));
  });
}

// ---- what people do

const report = (error) => { $("status").textContent = error.message; };
$("form").addEventListener("submit", (event) => { event.preventDefault(); send().catch(report); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => stopping?.abort());
$("anew").addEventListener("click", () => { histories.clear(); $("answers").replaceChildren(); $("prompt").focus(); });
$("key").addEventListener("change", () => load().catch(report));
for (const id of ["first", "second"]) $(id).addEventListener("change", () => draw().catch(report));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw().catch(report));
addEventListener("resize", () => { if ($("first").value) draw().catch(report); });
load().catch(report);
