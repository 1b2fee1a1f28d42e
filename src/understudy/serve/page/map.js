// The map: a row per layer, a cell per expert. Who is there is shown by size as well as by colour.

import { colours } from "./colours.js";
import { count, percent } from "./words.js";

const ABSENT = 0;
const LOADING = 1;
const STATE = [`not here`, "loading", "resident"];
const HOTTEST = 63;
const LEVELS_PER_DOUBLING = 5; // as the server counts
const CONTRAST = 1.7; // heat comes as a logarithm: without this, all that is used looks hot

const LARGEST = 30; // pixels of a cell
const SMALLEST = 3;
const GUTTER = 30; // for the layers' numbers
const RULER = 16; // for the experts' numbers
const TOP = 4;
const FOUND = 44; // width of a layer's bar: what was found in memory
const BESIDE = 12; // between cells and bars
const ARRIVAL = 700; // milliseconds for which a newcomer glows

const still = matchMedia("(prefers-reduced-motion: reduce)");

export class ExpertMap {
  constructor(canvas, box, note) {
    Object.assign(this, { canvas, box, note, cells: null, cursor: null, counted: null, scale: HOTTEST / 3 });
    this.context = canvas.getContext("2d");
    this.arrivals = new Map(); // cell -> when it came
    this.moving = false;
    this.palette = colours();
    new ResizeObserver(() => this.layOut()).observe(box);
    document.documentElement.addEventListener("theme", () => this.recolour());
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.inspect(null));
    canvas.addEventListener("keydown", (event) => this.walk(event));
  }

  setModel(facts) {
    Object.assign(this, { cells: null, cursor: null, counted: null });
    this.arrivals.clear();
    this.layers = facts.layers;
    this.slow = facts.tiers.slow;
    this.widest = Math.max(...facts.layers.map((layer) => layer.experts));
    let first = 0;
    this.first = facts.layers.map((layer) => (first += layer.experts) - layer.experts);
    this.layOut();
  }

  layOut() {
    if (!this.layers) return;
    const room = this.box.clientWidth - GUTTER - BESIDE - FOUND - 6;
    const fits = Math.floor(room / this.widest);
    this.pitch = Math.max(SMALLEST, Math.min(LARGEST, fits));
    this.gap = this.pitch >= 14 ? 2 : this.pitch >= 5 ? 1 : 0;
    this.bars = GUTTER + this.widest * this.pitch + BESIDE;
    const [width, height] = [this.bars + FOUND, TOP + this.layers.length * this.pitch + RULER];
    const dots = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: Math.round(width * dots), height: Math.round(height * dots) });
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    this.context.setTransform(dots, 0, 0, dots, 0, 0);
    this.draw();
  }

  recolour() {
    this.palette = colours();
    this.draw();
  }

  // ------------------------------------------------------------------------------- what is shown

  // cells: a byte each; counted: hits, late and misses of each layer
  show(cells, counted) {
    const before = this.cells;
    Object.assign(this, { cells, counted });
    const now = performance.now();
    let hottest = 0;
    for (let i = 0; i < cells.length; i++) {
      hottest = Math.max(hottest, cells[i] & HOTTEST);
      if (before && before[i] >> 6 < 2 && cells[i] >> 6 === 2) this.arrivals.set(i, now);
    }
    // The brightest is the hottest of now; slowly, so that the map does not flicker.
    this.scale += (Math.max(hottest, HOTTEST / 4) - this.scale) * 0.2;
    this.draw();
    if (this.cursor) this.tell();
    this.move();
  }

  draw() {
    if (!this.layers) return;
    const { context, palette } = this;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.drawNumbers();
    this.drawBars();
    for (let layer = 0; layer < this.layers.length; layer++) {
      for (let expert = 0; expert < this.layers[layer].experts; expert++) this.drawCell(layer, expert);
    }
    if (this.cursor) {
      const [layer, expert] = this.cursor;
      const size = this.pitch - this.gap;
      context.strokeStyle = palette.ink;
      context.lineWidth = 1.5;
      context.strokeRect(GUTTER + expert * this.pitch - 1, TOP + layer * this.pitch - 1, size + 2, size + 2);
    }
  }

  drawNumbers() {
    const { context, palette, pitch } = this;
    context.fillStyle = palette.quiet;
    context.font = `10px ${getComputedStyle(document.documentElement).getPropertyValue("--sans")}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const skip = Math.ceil(12 / pitch);
    for (let layer = 0; layer < this.layers.length; layer += skip) {
      context.fillText(String(layer), GUTTER - 8, TOP + (layer + 0.5) * pitch - this.gap / 2);
    }
    context.textAlign = "center";
    const step = [1, 2, 4, 8, 16, 32, 64].find((n) => n * pitch >= 26) ?? 128;
    const y = TOP + this.layers.length * pitch + RULER / 2 + 1;
    for (let expert = 0; expert < this.widest; expert += step) {
      context.fillText(String(expert), GUTTER + (expert + 0.5) * pitch - this.gap / 2, y);
    }
    context.textAlign = "left";
    if (this.counted) context.fillText("found", this.bars, y);
  }

  drawBars() {
    const { context, palette, pitch, gap } = this;
    const height = Math.min(pitch - gap, 8);
    this.counted?.forEach((counts, row) => {
      const lookups = sum(counts);
      let x = this.bars;
      ["hits", "late", "misses"].forEach((name, i) => {
        const width = lookups ? (FOUND * counts[i]) / lookups : 0;
        context.fillStyle = palette[name];
        context.fillRect(x, TOP + row * pitch + (pitch - gap - height) / 2, width, height);
        x += width;
      });
    });
  }

  // Full size: resident. Half: on its way. An empty place shows how much it is missed.
  drawCell(layer, expert, now = performance.now()) {
    const { context, palette, pitch, gap } = this;
    const index = this.first[layer] + expert;
    const cell = this.cells ? this.cells[index] : 0;
    const [x, y, size] = [GUTTER + expert * pitch, TOP + layer * pitch, pitch - gap];
    const warmth = palette.ramp[Math.round(HOTTEST * Math.min(1, (cell & HOTTEST) / this.scale) ** CONTRAST)];
    context.clearRect(x, y, size, size);
    if (cell >> 6 === ABSENT) {
      context.fillStyle = palette.absent;
      context.fillRect(x, y, size, size);
      if (cell & HOTTEST && pitch >= 5) this.dot(x, y, size, warmth);
    } else if (cell >> 6 === LOADING) {
      context.fillStyle = palette.absent;
      context.fillRect(x, y, size, size);
      context.globalAlpha = still.matches ? 1 : 0.65 + 0.35 * Math.sin(now / 130);
      const inset = pitch >= 5 ? Math.round(size / 4) : 0;
      context.fillStyle = palette.loading;
      context.fillRect(x + inset, y + inset, size - 2 * inset, size - 2 * inset);
      context.globalAlpha = 1;
    } else {
      context.fillStyle = warmth;
      context.fillRect(x, y, size, size);
      this.glow(index, x, y, size, now);
    }
  }

  dot(x, y, size, colour) {
    const side = Math.max(2, Math.round(size / 4));
    const inset = Math.floor((size - side) / 2);
    this.context.fillStyle = colour;
    this.context.fillRect(x + inset, y + inset, side, side);
  }

  // A newcomer wears the colour of loading for a moment.
  glow(index, x, y, size, now) {
    const came = this.arrivals.get(index);
    if (came === undefined || still.matches) return;
    const left = 1 - (now - came) / ARRIVAL;
    if (left <= 0) return;
    const { context, palette } = this;
    context.globalAlpha = left;
    if (size >= 6) {
      context.strokeStyle = palette.loading;
      context.lineWidth = 2;
      context.strokeRect(x + 1, y + 1, size - 2, size - 2);
    } else {
      context.fillStyle = palette.loading;
      context.fillRect(x, y, size, size);
    }
    context.globalAlpha = 1;
  }

  // Between two pictures only what glows or pulses is painted again.
  move() {
    if (this.moving || still.matches) return;
    this.moving = true;
    const paint = (now) => {
      const lively = this.lively(now);
      for (const index of lively) this.drawCell(...this.place(index), now);
      if (lively.length && !document.hidden) requestAnimationFrame(paint);
      else this.moving = false;
    };
    requestAnimationFrame(paint);
  }

  lively(now) {
    for (const [index, came] of this.arrivals) if (now - came > 2 * ARRIVAL) this.arrivals.delete(index);
    const found = [...this.arrivals.keys()];
    this.cells?.forEach((cell, index) => {
      if (cell >> 6 === LOADING) found.push(index);
    });
    return found;
  }

  place(index) {
    let layer = this.first.length - 1;
    while (this.first[layer] > index) layer--;
    return [layer, index - this.first[layer]];
  }

  // -------------------------------------------------------------------------- looking at one cell

  point(event) {
    const layer = Math.floor((event.offsetY - TOP) / this.pitch);
    const expert = Math.floor((event.offsetX - GUTTER) / this.pitch);
    const inside = expert >= 0 && expert < (this.layers?.[layer]?.experts ?? 0);
    this.inspect(inside ? [layer, expert] : null);
  }

  walk(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!this.layers) return;
    if (event.key === "Escape") return this.inspect(null);
    const [layer, expert] = this.cursor ?? [0, -1];
    const clamp = (value, most) => Math.max(0, Math.min(most, value));
    let next;
    if (event.key in steps) next = [layer + steps[event.key][0], expert + steps[event.key][1]];
    else if (event.key === "Home") next = [layer, 0];
    else if (event.key === "End") next = [layer, this.widest];
    else return;
    event.preventDefault();
    const row = clamp(next[0], this.layers.length - 1);
    this.inspect([row, clamp(next[1], this.layers[row].experts - 1)]);
  }

  inspect(cell) {
    if (String(cell) === String(this.cursor)) return;
    this.cursor = cell;
    this.tell();
    this.draw();
  }

  tell() {
    if (!this.cursor) {
      this.note.textContent = "Point at a cell, or use the arrow keys.";
      return;
    }
    const [layer, expert] = this.cursor;
    const cell = this.cells?.[this.first[layer] + expert] ?? 0;
    const state = cell >> 6 === ABSENT ? `on ${this.slow}` : STATE[cell >> 6];
    const text = `Layer ${layer}, expert ${expert}: ${state}, ${lately(cell & HOTTEST)}. ${this.found(layer)}`;
    if (this.note.textContent !== text) this.note.textContent = text;
  }

  found(layer) {
    const counts = this.counted?.[layer] ?? [0];
    return sum(counts) ? `The layer found ${percent(counts[0] / sum(counts))} in memory.` : "";
  }

  hottest(most) {
    const order = [...this.cells.keys()].sort((a, b) => (this.cells[b] & HOTTEST) - (this.cells[a] & HOTTEST));
    return order.slice(0, most).filter((i) => this.cells[i] & HOTTEST).map((i) => this.place(i));
  }
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

function lately(level) {
  const uses = Math.round(2 ** (level / LEVELS_PER_DOUBLING) - 1);
  return uses ? `${count(uses, "token")} lately` : "not used lately";
}
