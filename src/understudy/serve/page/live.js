// What the engine does now: reads the live stream and shows it as map, charts, budget and words.

import { Chart } from "./charts.js";
import { ExpertMap } from "./map.js";
import { ask, events } from "./stream.js";
import { bytes, count, percent, rate } from "./words.js";

const WINDOW = 3; // seconds that a number speaks about
const PATIENCE = [1, 2, 4, 8]; // seconds between attempts to connect

const WHY = { loading: "loading the model", draining: "shutting down", engine_dead: "the engine has stopped" };

const byId = (id) => document.getElementById(id);
const figure = (name) => byId(`chart-${name}`);

export class Live {
  constructor({ onModel, onKeyWanted }) {
    Object.assign(this, { onModel, onKeyWanted });
    this.map = new ExpertMap(byId("map"), byId("map-box"), byId("cell"));
    this.charts = {
      lookups: new Chart(figure("lookups"), ["hits", "late", "misses"]),
      prefetch: new Chart(figure("prefetch"), ["prefetch"], { line: true, most: 1 }),
      bytes: new Chart(figure("bytes"), ["demand", "prefetch"]),
      stall: new Chart(figure("stall"), ["misses"], { most: 1 }),
      tokens: new Chart(figure("tokens"), ["accent", "line"]),
      requests: new Chart(figure("requests"), ["line", "rule"]),
    };
    this.recent = []; // pictures of the last seconds
    this.attempt = 0;
    this.connection = null;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.leave() : this.connect()));
  }

  // A page that nobody sees does not watch.
  leave() {
    clearTimeout(this.again);
    this.connection?.abort();
    this.connection = null;
  }

  async connect() {
    this.leave();
    const connection = (this.connection = new AbortController());
    try {
      await this.watch(connection.signal);
      throw new Error("the server has ended the stream");
    } catch (error) {
      if (connection.signal.aborted) return;
      if (error.status === 401) {
        this.say("gone", "needs an API key");
        return this.onKeyWanted();
      }
      this.say("gone", WHY[error.code] ?? (error.status === 429 ? "too many pages watch" : "no connection"));
      this.again = setTimeout(() => this.connect(), 1000 * PATIENCE[Math.min(this.attempt++, PATIENCE.length - 1)]);
    }
  }

  async watch(signal) {
    const facts = await (await ask("understudy/model", { signal })).json();
    this.setModel(facts);
    for await (const data of events(await ask("understudy/live", { signal }))) {
      this.attempt = 0;
      this.show(JSON.parse(data));
    }
  }

  setModel(facts) {
    this.facts = facts;
    this.map.setModel(facts);
    byId("budget").replaceChildren();
    byId("budget-parts").replaceChildren();
    this.cells = facts.layers.reduce((total, layer) => total + layer.experts, 0);
    byId("slow-tier").textContent = facts.tiers.slow === "disk" ? "on disk" : `in ${facts.tiers.slow} memory`;
    this.onModel(facts);
  }

  show(picture) {
    this.time = (this.time ?? 0) + picture.seconds;
    this.recent.push(picture);
    while (this.recent.length > 1 && sum(this.recent.slice(1), "seconds") >= WINDOW) this.recent.shift();
    this.map.show(Uint8Array.from(atob(picture.cells), (letter) => letter.charCodeAt(0)), picture.layers);
    this.chart(picture);
    this.summarise(picture);
    this.budget(picture);
    this.status(picture);
  }

  lately(name) {
    return sum(this.recent, name);
  }

  // Per second over the last few seconds.
  pace(name) {
    return this.lately(name) / Math.max(this.lately("seconds"), 1e-3);
  }

  // ---------------------------------------------------------------------------------- the charts

  chart(picture) {
    const { charts, time } = this;
    const [hits, late, misses] = ["hits", "late", "misses"].map((name) => this.pace(name));
    const lookups = hits + late + misses;
    charts.lookups.add(
      time, [hits, late, misses], lookups ? percent(hits / lookups) : "–",
      lookups ? [`${rate(hits)} hits/s`, `${rate(late)} late`, `${rate(misses)} missed`] : "no lookups",
    );
    this.chartPrefetch(picture);
    const [demand, prefetch] = ["demand_bytes", "prefetch_bytes"].map((name) => this.pace(name));
    charts.bytes.add(
      time, [demand, prefetch], `${bytes(demand + prefetch)}/s`,
      demand + prefetch ? [`${bytes(demand)}/s on demand`, `${bytes(prefetch)}/s ahead`] : "nothing was read",
    );
    const stall = Math.min(1, this.pace("stall_seconds"));
    charts.stall.add(time, [stall], percent(stall), "of the time");
    const [fresh, prompt] = [this.pace("new_tokens"), this.pace("prompt_tokens")];
    charts.tokens.add(time, [fresh, prompt], `${rate(fresh)}/s`, [`${rate(fresh)} new`, `${rate(prompt)} of prompts`]);
    const { running, waiting } = picture;
    charts.requests.add(
      time, [running, waiting], String(running),
      [`${running} running`, `${waiting} waiting`],
    );
  }

  chartPrefetch(picture) {
    const [issued, used, wasted] = ["issued", "used", "wasted"].map((name) => this.lately(`prefetch_${name}`));
    const settled = used + wasted;
    const precision = settled ? used / settled : null;
    const off = picture.speculating ? "nothing to foresee" : "switched off";
    this.charts.prefetch.add(
      this.time, [precision], precision === null ? "–" : percent(precision),
      issued || settled ? `${rate(this.pace("prefetch_issued"))} foreseen/s, ${rate(this.pace("prefetch_wasted"))} in vain` : off,
    );
  }

  // ------------------------------------------------------------------------------------- in words

  summarise(picture) {
    const share = percent(picture.resident / this.cells);
    const names = this.map.hottest(3).map(([layer, expert]) => `${layer}.${expert}`);
    const busiest = names.length ? ` Busiest (layer.expert): ${names.join(", ")}.` : "";
    const text = `${count(picture.resident, "expert")} of ${this.cells.toLocaleString("en")} resident (${share}).${busiest}`;
    byId("summary").textContent = text;
  }

  status(picture) {
    if (!picture.alive) this.say("gone", "the engine has stopped");
    else if (picture.draining) this.say("busy", "shutting down");
    else if (picture.running + picture.waiting) this.say("busy", count(picture.running + picture.waiting, "request"));
    else this.say("live", "idle");
  }

  say(state, text) {
    const status = byId("status");
    if (status.textContent === text && status.dataset.state === state) return;
    status.dataset.state = state;
    status.textContent = text;
  }

  // ------------------------------------------------------------------------------------ the budget

  budget(picture) {
    const { plan } = this.facts;
    const experts = plan.slots * plan.slot_bytes;
    const kv = picture.kv_total ? picture.kv_used / picture.kv_total : 0;
    const full = plan.slots ? picture.resident / plan.slots : 0;
    const parts = [
      ["dense", "dense weights", plan.dense, 1],
      ["kv", `KV cache ${percent(kv)} full,`, plan.kv, kv],
      ["buffers", "working memory", plan.staging + plan.activations + plan.predictors, 1],
      ["experts", `expert slots ${percent(full)} full,`, experts, full],
      ["free", "free", Math.max(0, plan.total - plan.used), 0],
    ].filter(([, , size]) => size > 0);
    if (!byId("budget").childElementCount) this.buildBudget(parts);
    parts.forEach(([, words, size, used], i) => {
      byId("budget").children[i].firstElementChild.style.width = `${100 * used}%`;
      byId("budget-parts").children[i].lastChild.data = `${words} ${bytes(size)}`;
    });
  }

  buildBudget(parts) {
    byId("budget-total").textContent = `${bytes(this.facts.plan.total)} in all`;
    for (const [name, , size] of parts) {
      const bar = document.createElement("div");
      bar.dataset.part = name;
      bar.style.flexGrow = size;
      bar.append(document.createElement("i"));
      byId("budget").append(bar);
      const item = document.createElement("li");
      item.dataset.part = name;
      const swatch = document.createElement("i");
      swatch.className = "swatch";
      item.append(swatch, document.createTextNode(""));
      byId("budget-parts").append(item);
    }
  }
}

const sum = (pictures, name) => pictures.reduce((total, picture) => total + picture[name], 0);
