// Reads the figures once a second and draws them. No framework, nothing from anywhere else.

const byId = (id) => document.getElementById(id);
const text = (id, value) => { if (byId(id).textContent !== value) byId(id).textContent = value; };
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
const percent = (value, digits = 2) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`);

function scaled(value, unit = "") {
  for (const [size, prefix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= size) return `${(value / size).toPrecision(3)} ${prefix}${unit}`;
  }
  return `${Math.round(value)} ${unit}`;
}

// --- charts

const SVG = "http://www.w3.org/2000/svg";
const SIZE = { width: 520, height: 170, left: 52, right: 8, top: 8, bottom: 20 };

function element(name, attributes, content) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (content !== undefined) made.textContent = content;
  return made;
}

// A round number at or above the largest value.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

function chart(id, points, lines, { limit = null, least = 1, label, format }) {
  const svg = byId(id);
  const { width, height, left, right, top, bottom } = SIZE;
  const values = lines.flatMap(({ of }) => points.map(of)).filter((value) => value !== null && value !== undefined);
  const highest = ceiling(Math.max(least, limit ?? 0, ...values));
  const end = points.length ? points.at(-1).time : 0;
  const start = points.length ? Math.min(points[0].time, end - 30) : -30;
  const x = (time) => left + ((time - start) / (end - start)) * (width - left - right);
  const y = (value) => top + (1 - value / highest) * (height - top - bottom);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const at = y(share * highest);
    parts.push(element("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }));
    parts.push(element("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, format(share * highest)));
  }
  for (const [time, anchor] of [[start, "start"], [end, "end"]]) {
    parts.push(element("text", { x: x(time), y: height - 4, "text-anchor": anchor }, clock(time)));
  }
  if (limit !== null) {
    parts.push(element("line", { class: "limit", x1: left, x2: width - right, y1: y(limit), y2: y(limit) }));
  }
  for (const { of, style } of lines) {
    const known = points.filter((point) => of(point) !== null && of(point) !== undefined);
    const line = known.map((point) => `${x(point.time).toFixed(1)},${y(of(point)).toFixed(1)}`).join(" ");
    parts.push(element("polyline", { class: style, points: line }));
  }
  svg.replaceChildren(...parts);
  svg.setAttribute("aria-label", label);
}

// --- tables

function rows(id, entries, cells) {
  const table = byId(id);
  const made = entries.map((entry) => {
    const row = document.createElement("tr");
    for (const [content, style] of cells(entry)) {
      const cell = document.createElement("td");
      cell.textContent = content;
      if (style) cell.className = style;
      row.append(cell);
    }
    return row;
  });
  table.replaceChildren(...made);
}

// --- one look

const GOOD = new Set(["running", "full"]);

function show(sides) {
  // Where both sides are one process, A's figures stand for the link: both parties count alike.
  const main = sides[0];
  const bad = sides.find((side) => !GOOD.has(side.state)) ?? main;
  text("state", bad.note ? `${bad.state}: ${bad.note}` : bad.state);
  byId("state").className = `state ${GOOD.has(bad.state) ? "good" : "bad"}`;

  const { optics, authentication, blocks, keys, history } = main;
  const limit = optics.max_qber ?? null;
  text("qber", percent(main.qber));
  text("qber-note", limit === null ? "" : `thrown away above ${percent(limit, 1)}`);
  byId("qber").parentElement.classList.toggle("bad", limit !== null && main.qber > limit);
  text("sifted", scaled(main.sifted_bit_s, "bit/s"));
  text("secret", scaled(main.secret_bit_s, "bit/s"));
  text("secret-note", `${keys.made} keys so far${keys.discarded ? `, ${keys.discarded} for want of room not stored` : ""}`);
  text("blocks", `${blocks.kept} kept`);
  const [done, wanted] = blocks.progress;
  const reasons = Object.entries(blocks.reasons).map(([reason, count]) => `${count}: ${reason}`).join("; ");
  text("blocks-note", `${blocks.aborted} thrown away${reasons ? ` (${reasons})` : ""}; next at ${wanted ? Math.min(100, Math.floor((100 * done) / wanted)) : 0} %`);
  byId("blocks").parentElement.classList.toggle("bad", Boolean(blocks.last?.reason));
  text("share", percent(authentication.share));
  text("share-note", `of the secret key; ${scaled(authentication.spent_bits ?? 0, "bit")} spent, ${scaled(authentication.made_bits ?? 0, "bit")} made`);
  text("reserve", `${authentication.reserve_keys ?? 0} keys`);
  text("reserve-note", `now by ${authentication.mode ?? "–"}; bootstraps: ${authentication.bootstraps ?? 0}, forgeries: ${authentication.failures ?? 0}`);
  byId("reserve").parentElement.classList.toggle("bad", (authentication.failures ?? 0) > 0);

  for (const side of sides) {
    text(`kme-${side.side}`, side.kme_id ?? "KME");
    const here = side.side === "a" ? side.keys.for_a : side.keys.for_b;
    text(`store-${side.side}`, `${here} of ${side.keys.capacity} keys`);
  }
  const set = main.controls;
  text("fibre-text", set ? `fibre, ${set.length_km} km` : "fibre");
  const down = set ? set.paused : main.state === "down";
  byId("fibre").classList.toggle("cut", down);
  byId("channel").classList.toggle("cut", down);
  const eve = set ? [[set.intercept, "intercepts"], [set.splitting, "splits"]].filter(([share]) => share > 0) : [];
  if (set?.extra_loss_db) eve.push([null, `${set.extra_loss_db} dB`]);
  byId("eve").toggleAttribute("hidden", eve.length === 0);
  text("eve-text", `Eve ${eve.map(([share, what]) => (share === null ? what : `${what} ${Math.round(100 * share)} %`)).join(", ")}`);
  byId("middle").toggleAttribute("hidden", !set || set.middle === "off");
  text("middle-text", set ? `Mallory: ${set.middle}` : "");
  text("link-text", `Sites A and B. ${byId("fibre-text").textContent}. ${eve.length ? byId("eve-text").textContent : "No eavesdropper"}. `
    + `${set && set.middle !== "off" ? byId("middle-text").textContent : "Nobody in the middle of the classical channel"}.`);

  const number = (value) => scaled(value).trim();
  chart("chart-qber", history, [{ of: (point) => (point.qber === null ? null : 100 * point.qber), style: "one" }],
    { limit: limit === null ? null : 100 * limit, least: 2, label: `QBER now ${percent(main.qber)}`, format: (value) => value.toPrecision(2) });
  chart("chart-rate", history, [{ of: (point) => point.sifted_bit_s, style: "one" }, { of: (point) => point.secret_bit_s, style: "two" }],
    { label: `sifted ${scaled(main.sifted_bit_s, "bit/s")}, secret ${scaled(main.secret_bit_s, "bit/s")}`, format: number });
  chart("chart-store", history, [{ of: (point) => point.for_a, style: "one" }, { of: (point) => point.for_b, style: "two" }],
    { least: Math.max(1, keys.capacity), label: `${keys.for_a} keys for masters at A, ${keys.for_b} at B`, format: number });
  chart("chart-auth", history, [{ of: (point) => point.authentication_made_bits, style: "one" }, { of: (point) => point.authentication_spent_bits, style: "two" }],
    { label: `${authentication.made_bits ?? 0} bits made, ${authentication.spent_bits ?? 0} spent`, format: number });

  const deliveries = sides.flatMap((side) => side.deliveries.map((delivery) => ({ ...delivery, kme: side.kme_id ?? side.side.toUpperCase() })));
  deliveries.sort((one, other) => other.time - one.time);
  text("delivered", sides.map((side) => `${side.kme_id ?? side.side.toUpperCase()}: ${side.keys.delivered.master} to masters, ${side.keys.delivered.slave} to slaves.`).join(" "));
  rows("deliveries", deliveries.slice(0, 100), (one) => [[clock(one.time)], [one.kme], [one.sae_id], [one.role], [one.key_id, "id"]]);
  const events = sides.flatMap((side) => side.events.map((event) => ({ ...event, side: side.side.toUpperCase() })));
  events.sort((one, other) => other.time - one.time);
  rows("events", events.slice(0, 100), (one) => [[clock(one.time)], [one.side], [one.count > 1 ? `${one.text} (${one.count} times)` : one.text]]);
}

// --- switches

const form = byId("controls");
const PERCENTS = ["intercept", "splitting"];
let touched = false;

function showControls(set) {
  byId("switches").disabled = !set;
  byId("no-controls").hidden = Boolean(set);
  if (!set || touched || form.contains(document.activeElement)) return;
  for (const [name, value] of Object.entries(set)) {
    const input = form.elements.namedItem(name);
    if (!input) continue;
    if (input.type === "checkbox") input.checked = value;
    else input.value = PERCENTS.includes(name) ? Math.round(100 * value) : value;
  }
  showOutputs();
}

function showOutputs() {
  text("length-out", `${form.elements.length_km.value} km`);
  for (const name of PERCENTS) text(`${name}-out`, `${form.elements[name].value} %`);
}

async function change({ target }) {
  const value = target.type === "checkbox" ? target.checked : target.name === "middle" ? target.value
    : PERCENTS.includes(target.name) ? Number(target.value) / 100 : Number(target.value);
  touched = true;
  try {
    const answer = await fetch("controls", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ [target.name]: value }),
    });
    text("told", answer.ok ? `Set at ${clock(Date.now() / 1000)}. It counts from the next pulses or message on.` : (await answer.json()).message);
  } catch {
    text("told", "The link did not answer.");
  } finally {
    touched = false;
  }
}

form.addEventListener("input", showOutputs);
form.addEventListener("change", change);
form.addEventListener("submit", (event) => event.preventDefault());

// --- again and again

async function look() {
  try {
    const answer = await fetch("figures", { cache: "no-store" });
    const { sides } = await answer.json();
    show(sides);
    showControls(sides[0].controls);
    document.body.dataset.looks = String(1 + Number(document.body.dataset.looks ?? 0));
  } catch (error) {
    text("state", error instanceof TypeError ? "no answer from the link" : `${error}`);
    byId("state").className = "state bad";
  }
  setTimeout(look, 1000);
}

look();
