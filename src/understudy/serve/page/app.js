// Puts the page together: chat, live picture, and the key where the server asks for one.

import { Chat } from "./chat.js";
import { Live } from "./live.js";
import { setKey } from "./stream.js";
import { bytes, count } from "./words.js";

const byId = (id) => document.getElementById(id);

function askForKey() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

function introduce(facts) {
  const { plan, layers } = facts;
  chat.model = facts.model;
  document.title = `${facts.model} · Understudy`;
  byId("model-name").textContent = facts.model;
  byId("max-tokens").max = facts.context;
  byId("model-facts").textContent = [
    `${count(layers.length, "layer")} of ${layers[0].experts} experts, ${facts.experts_per_token} per token`,
    `${bytes(plan.expert_bytes)} each`,
    `room for ${plan.slots} of ${plan.experts}`,
  ].join(" · ");
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  byId("key-form").hidden = true;
  live.connect();
  byId("message").focus();
});

const chat = new Chat({ onKeyWanted: askForKey });
const live = new Live({ onModel: introduce, onKeyWanted: askForKey });
live.connect();
