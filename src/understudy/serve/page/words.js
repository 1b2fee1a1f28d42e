// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

function digits(value) {
  if (value === 0) return "0";
  return value.toFixed(value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2);
}

export function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? digits(value) : Math.round(value)} ${UNITS[unit]}`;
}

export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;

export const seconds = (value) => (value < 1 ? milliseconds(value) : `${digits(value)} s`);

export const milliseconds = (value) => (value < 1 ? `${digits(1000 * value)} ms` : `${digits(value)} s`);

export const rate = (value) => (value >= 9.5 ? Math.round(value).toLocaleString("en") : value ? value.toFixed(1) : "0");

export function count(number, noun) {
  const many = noun.endsWith("s") ? `${noun}es` : `${noun}s`;
  return `${number.toLocaleString("en")} ${number === 1 ? noun : many}`;
}
