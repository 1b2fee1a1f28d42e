// The colours of the style sheet, for canvases: resolved for the theme that is on now.

const NAMES = [
  "ink", "quiet", "rule", "paper", "absent", "loading", "heat-0", "heat-1", "heat-2", "heat-3", "heat-4",
  "hits", "late", "misses", "demand", "prefetch", "line", "accent",
];
const RAMP = ["heat-0", "heat-1", "heat-2", "heat-3", "heat-4"];
const STEPS = 64;

export function colours() {
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const found = {};
  for (const name of NAMES) {
    probe.style.color = `var(--${name})`;
    found[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  found.ramp = ramp(RAMP.map((name) => channels(found[name])));
  return found;
}

const channels = (text) => text.match(/[\d.]+/g).slice(0, 3).map(Number);

function ramp(stops) {
  return Array.from({ length: STEPS }, (_, step) => {
    const place = (step / (STEPS - 1)) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const mixed = stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (place - low)));
    return `rgb(${mixed.join(" ")})`;
  });
}
