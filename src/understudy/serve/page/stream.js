// Talks with the server: JSON and server-sent events over fetch, because only fetch can send a key.

const KEY = "understudy-api-key";

let key = remembered();

// Storage may be forbidden; then the key lasts as long as the page.
function remembered() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

export class Refusal extends Error {
  constructor(status, message, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export function setKey(typed) {
  key = typed;
  try {
    sessionStorage.setItem(KEY, typed);
  } catch {
    // see above
  }
}

// -> Response; throws a Refusal in the server's own words
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the server does not answer; is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let error = { message: `the server answered ${response.status}` };
  try {
    error = (await response.json()).error;
  } catch {
    // not our envelope: a proxy in between
  }
  const wait = response.headers.get("Retry-After");
  const message = wait ? `${error.message}; try again in ${wait} s` : error.message;
  return new Refusal(response.status, message, error.code);
}

// The data of each event, as text.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
