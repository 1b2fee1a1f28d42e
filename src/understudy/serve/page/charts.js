// Small charts of the last minute: stacked areas, or one line. They share one clock.

import { colours } from "./colours.js";

const SPAN = 60; // seconds shown
const PAD = 2; // pixels

let palette = null;
document.documentElement.addEventListener("theme", () => { palette = null; });

export class Chart {
  // layers: names of colours, bottom first; a single one with line: true is drawn as a line
  constructor(figure, layers, { line = false, most = null } = {}) {
    Object.assign(this, { layers, line, most });
    this.canvas = figure.querySelector("canvas");
    this.value = figure.querySelector("b");
    this.small = figure.querySelector("small");
    this.points = []; // [seconds, ...values]; null: nothing to say
  }

  // small: words, or words for each of the layers
  add(time, values, value, small) {
    this.points.push([time, ...values]);
    while (this.points[0][0] < time - SPAN) this.points.shift();
    this.value.textContent = value;
    if (typeof small === "string") this.small.textContent = small;
    else this.small.replaceChildren(...small.map((words, i) => key(this.layers[i], words)));
    this.draw(time);
  }

  draw(now) {
    const { canvas } = this;
    const dots = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(width * dots) || canvas.height !== Math.round(height * dots)) {
      Object.assign(canvas, { width: Math.round(width * dots), height: Math.round(height * dots) });
    }
    const context = canvas.getContext("2d");
    context.setTransform(dots, 0, 0, dots, 0, 0);
    context.clearRect(0, 0, width, height);
    palette ??= colours();
    const floor = height - 1;
    const x = (time) => width * (1 - (now - time) / SPAN);
    const top = this.most ?? Math.max(...this.points.map((p) => sum(p.slice(1))), 1e-9);
    const y = (value) => floor - (value / top) * (floor - PAD);
    context.fillStyle = palette.rule;
    context.fillRect(0, floor, width, 1);
    if (this.line) this.drawLine(context, x, y);
    else this.layers.forEach((colour, i) => this.drawArea(context, x, y, i, palette[colour]));
  }

  drawArea(context, x, y, layer, colour) {
    const { points } = this;
    if (points.length < 2) return;
    const upTo = (point, count) => sum(point.slice(1, count + 1));
    context.beginPath();
    for (const point of points) context.lineTo(x(point[0]), y(upTo(point, layer + 1)));
    for (const point of points.toReversed()) context.lineTo(x(point[0]), y(upTo(point, layer)));
    context.closePath();
    context.fillStyle = colour;
    context.fill();
  }

  drawLine(context, x, y) {
    context.beginPath();
    let drawing = false;
    for (const [time, value] of this.points) {
      if (value === null) drawing = false;
      else if (drawing) context.lineTo(x(time), y(value));
      else {
        context.moveTo(x(time), y(value));
        drawing = true;
      }
    }
    context.strokeStyle = palette[this.layers[0]];
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    context.stroke();
  }
}

function key(colour, words) {
  const made = document.createElement("span");
  const swatch = document.createElement("i");
  swatch.dataset.part = colour;
  made.append(swatch, words);
  return made;
}

const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);
