// The conversation: what was said, one answer streaming in, what it cost. Text of the model is only
// ever put into text nodes.

import { ask, events } from "./stream.js";
import { count, milliseconds, seconds } from "./words.js";

const byId = (id) => document.getElementById(id);

export class Chat {
  constructor({ onKeyWanted }) {
    this.messages = [];
    this.model = null;
    this.abort = null; // of the answer under way
    this.onKeyWanted = onKeyWanted;
    this.log = byId("log");
    this.message = byId("message");
    this.listen();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.message.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.abort) this.stop();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.clear());
  }

  stop() {
    this.abort?.abort();
    this.message.focus();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.log.querySelectorAll(".turn").forEach((turn) => turn.remove());
    byId("nothing-yet").hidden = false;
    byId("clear").disabled = true;
    this.complain("");
    this.message.focus();
  }

  complain(text) {
    const problem = byId("problem");
    problem.textContent = text && `${text[0].toUpperCase()}${text.slice(1)}.`;
    problem.hidden = !text;
  }

  async send() {
    const said = this.message.value.trim();
    if (!said || this.abort) return;
    this.complain("");
    this.message.value = "";
    this.add("You", said);
    this.messages.push({ role: "user", content: said });
    const turn = this.add("Answer", "");
    turn.classList.add("answer");
    const answer = new Answer(turn, () => this.follow());
    this.busy(new AbortController());
    try {
      await answer.read(await ask("v1/chat/completions", this.request()));
    } catch (error) {
      if (error.name !== "AbortError") this.failed(error, answer, said);
    } finally {
      this.busy(null);
      answer.finish();
    }
    if (answer.content) this.messages.push({ role: "assistant", content: answer.content });
    else if (this.messages.at(-1)?.role === "user") this.messages.pop();
  }

  request() {
    const system = byId("system").value.trim();
    const body = {
      messages: [...(system ? [{ role: "system", content: system }] : []), ...this.messages],
      stream: true,
      stream_options: { include_usage: true },
      understudy: true,
    };
    if (this.model) body.model = this.model;
    for (const [id, name] of [["temperature", "temperature"], ["max-tokens", "max_tokens"]]) {
      if (byId(id).value !== "") body[name] = byId(id).valueAsNumber;
    }
    return {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: this.abort.signal,
    };
  }

  // Nothing was answered: the message goes back to where it was typed.
  failed(error, answer, said) {
    this.complain(error.message);
    if (!answer.content) {
      answer.turn.previousElementSibling?.remove();
      answer.turn.remove();
      if (!this.message.value) this.message.value = said;
      byId("nothing-yet").hidden = this.log.querySelector(".turn") !== null;
    }
    if (error.status === 401) this.onKeyWanted();
  }

  busy(abort) {
    this.abort = abort;
    byId("stop").hidden = !abort;
    byId("send").hidden = Boolean(abort);
    byId("clear").disabled = !this.log.querySelector(".turn");
  }

  add(who, text) {
    byId("nothing-yet").hidden = true;
    const turn = element("article", "turn");
    turn.append(element("h3", "", who), element("p", "text", text));
    this.log.append(turn);
    this.follow(true);
    return turn;
  }

  // Stay at the end, unless the reader has scrolled up.
  follow(always = false) {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    if (always || scrollHeight - scrollTop - clientHeight < 80) this.log.scrollTop = scrollHeight;
  }
}

class Answer {
  constructor(turn, onText) {
    this.turn = turn;
    this.onText = onText;
    this.content = "";
    this.finished = null;
    this.text = document.createTextNode("");
    turn.querySelector(".text").append(this.text);
    turn.setAttribute("aria-busy", "true"); // read aloud once, as a whole
  }

  async read(response) {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      this.take(chunk);
    }
    throw new Error("the answer broke off: the connection was lost");
  }

  take(chunk) {
    const [choice] = chunk.choices ?? [];
    const piece = choice?.delta?.content;
    if (piece) {
      this.content += piece;
      this.text.data = this.content.trimStart();
      this.onText();
    }
    if (choice?.finish_reason) this.finished = choice.finish_reason;
    this.usage = chunk.usage ?? this.usage;
    this.experts = chunk.understudy ?? this.experts;
  }

  finish() {
    this.turn.setAttribute("aria-busy", "false");
    const facts = element("p", "facts");
    for (const fact of this.facts()) facts.append(element("span", "", fact));
    if (facts.childElementCount) this.turn.append(facts);
    this.onText();
  }

  facts() {
    const { usage, experts } = this;
    const found = [];
    if (!this.finished) found.push("stopped");
    if (this.finished === "length") found.push("cut short");
    if (experts) {
      found.push(`first token ${milliseconds(experts.ttft_seconds)}`);
      if (experts.tpot_seconds > 0) found.push(`${(1 / experts.tpot_seconds).toFixed(1)} tokens/s`);
    }
    if (usage) found.push(count(usage.completion_tokens, "token"));
    if (experts) {
      found.push(`${count(experts.hits, "hit")}, ${count(experts.misses, "miss")}`);
      found.push(`waited ${seconds(experts.stall_seconds)} for experts`);
    }
    return found;
  }
}

function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}
