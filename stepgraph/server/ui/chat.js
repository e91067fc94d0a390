// A conversation over /v1/chat/completions, streamed.

import { AnswerText } from "./answer_text.js";
import { count, duration, printable, several } from "./format.js";
import { eventsOf } from "./server.js";

const $ = (id) => document.getElementById(id);
const TOOL_CALLS_SHOWN = 64; // of an answer

export class Chat {
  #messages = [];
  #stopper = null;
  #mine = new Set(); // names of the requests of this chat

  /** `showSteps(name)` shows the steps of a request. */
  constructor(server, showSteps) {
    this.server = server;
    this.showSteps = showSteps;
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("message").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    $("stop").addEventListener("click", () => this.stop());
    $("chat-clear").addEventListener("click", () => this.clear());
  }

  /** Offer the models that there are; called whenever the server is there. */
  async learnModels() {
    const { data } = await (await this.server.fetch("v1/models")).json();
    const chosen = $("model").value;
    $("model").replaceChildren(...data.map(({ id }) => new Option(printable(id), id, false, id === chosen)));
    $("model-field").hidden = data.length < 2;
  }

  /** Whether it was this chat that sent a request. */
  sent(name) {
    return this.#mine.has(name);
  }

  get isAnswering() {
    return this.#stopper !== null;
  }

  stop() {
    this.#stopper?.abort();
  }

  clear() {
    this.stop();
    this.#messages = [];
    $("messages").replaceChildren($("chat-empty"));
    $("chat-empty").hidden = false;
    $("message").focus();
  }

  async send() {
    const content = $("message").value.trim();
    if (!content || this.isAnswering) return;
    $("message").value = "";
    $("chat-empty").hidden = true;
    const question = { role: "user", content };
    const messages = [...this.#messages, question];
    this.#messages = messages;
    const asked = this.#bubble("user", "You");
    const said = new AnswerText(asked.body);
    said.add(content);
    said.end();
    const answer = new Answer(this.#bubble("assistant", "Model"));
    this.#setAnswering(new AbortController());
    const stopper = this.#stopper;
    this.#scroll(true);
    let failure = null;
    try {
      await this.#stream(messages, answer, stopper.signal);
    } catch (error) {
      if (!stopper.signal.aborted) failure = error;
    }
    answer.end(stopper.signal.aborted ? "stopped" : null);
    const isThis = this.#messages === messages; // no new chat was begun meanwhile
    if (failure) {
      answer.fail(failure instanceof TypeError ? "The connection to the server is lost." : failure.message);
      if (isThis && !answer.content) {
        this.#messages = messages.slice(0, -1); // most templates want questions and answers in turn
        if (!$("message").value) $("message").value = content;
      }
    }
    if (isThis && (answer.content || !failure)) this.#messages = [...messages, { role: "assistant", content: answer.content }];
    if (this.#stopper === stopper) this.#setAnswering(null);
    this.#scroll();
  }

  async #stream(messages, answer, signal) {
    const system = $("system").value.trim();
    const [temperature, maxTokens] = [$("temperature").value, $("max-tokens").value];
    const body = {
      messages: system ? [{ role: "system", content: system }, ...messages] : messages,
      ...($("model").value ? { model: $("model").value } : {}),
      ...(temperature === "" ? {} : { temperature: Number(temperature) }),
      ...(maxTokens === "" ? {} : { max_tokens: Number(maxTokens) }),
      stream: true,
      stream_options: { include_usage: true },
    };
    const response = await this.server.fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message ?? "the answer broke off");
      if (!answer.isNamed && chunk.id) {
        this.#mine.add(chunk.id);
        answer.link(() => this.showSteps(chunk.id));
      }
      answer.add(chunk);
      this.#scroll();
    }
    throw new Error("the answer broke off");
  }

  #setAnswering(stopper) {
    this.#stopper = stopper;
    $("send").hidden = stopper !== null;
    $("stop").hidden = stopper === null;
  }

  #bubble(role, name) {
    const article = document.createElement("article");
    article.className = role;
    article.setAttribute("aria-label", name);
    const body = article.appendChild(document.createElement("div"));
    body.className = "text";
    $("messages").append(article);
    return { article, body };
  }

  /** Keep the end in view, unless the reader has scrolled away from it. */
  #scroll(always = false) {
    const log = $("messages");
    if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) {
      requestAnimationFrame(() => (log.scrollTop = log.scrollHeight));
    }
  }
}

/** One answer while it comes. */
class Answer {
  content = "";
  isNamed = false;
  #started = performance.now();
  #first = null;
  #usage = null;
  #reason = null;
  #calls = new Map();
  #thoughts = null;

  constructor({ article, body }) {
    this.article = article;
    article.setAttribute("aria-busy", "true"); // it is read out when it is whole
    this.body = body;
    this.text = new AnswerText(body);
    this.foot = article.appendChild(document.createElement("p"));
    this.foot.className = "foot";
    this.numbers = this.foot.appendChild(document.createElement("span"));
    this.numbers.textContent = "Waiting for the first token…";
  }

  link(show) {
    this.isNamed = true;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "link";
    button.textContent = "its steps";
    button.addEventListener("click", show);
    this.foot.append(" ", button);
  }

  add(chunk) {
    this.#usage = chunk.usage ?? this.#usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.#reason = choice.finish_reason ?? this.#reason;
    const { content, reasoning_content: thought, tool_calls: calls } = choice.delta ?? {};
    if (content || thought || calls) {
      this.#first ??= performance.now();
      this.numbers.textContent = "";
    }
    if (thought) this.#think(thought);
    if (content) {
      this.content += content;
      this.text.add(content);
    }
    for (const call of calls ?? []) this.#call(call);
  }

  end(why) {
    this.article.removeAttribute("aria-busy");
    this.text.end();
    this.#thoughts?.end();
    for (const { text } of this.#calls.values()) text.end();
    const [took, waited] = [performance.now() - this.#started, (this.#first ?? NaN) - this.#started];
    const tokens = this.#usage?.completion_tokens;
    this.numbers.textContent = [
      why,
      this.#reason && this.#reason !== "stop" ? `ended by ${this.#reason}` : null,
      this.#usage ? several(this.#usage.prompt_tokens, "prompt token") : null,
      tokens == null ? null : several(tokens, "token"),
      waited > 0 ? `first after ${duration(waited / 1000)}` : null,
      tokens > 1 && took > waited ? `${count(((tokens - 1) * 1000) / (took - waited))} tokens/s` : null,
    ].filter(Boolean).join(" · ");
  }

  fail(message) {
    const line = this.article.insertBefore(document.createElement("p"), this.foot);
    line.className = "error";
    line.setAttribute("role", "alert");
    line.textContent = printable(message);
  }

  #think(text) {
    if (!this.#thoughts) {
      const details = document.createElement("details");
      details.className = "reasoning";
      details.appendChild(document.createElement("summary")).textContent = "Reasoning";
      this.#thoughts = new AnswerText(details.appendChild(document.createElement("div")));
      this.article.insertBefore(details, this.body);
    }
    this.#thoughts.add(text);
  }

  #call({ index = 0, function: called = {} }) {
    let call = this.#calls.get(index);
    if (!call) {
      if (this.#calls.size >= TOOL_CALLS_SHOWN) return;
      const box = this.article.insertBefore(document.createElement("div"), this.foot);
      box.className = "call";
      box.appendChild(document.createElement("strong")).textContent = "Tool call";
      call = { text: new AnswerText(box.appendChild(document.createElement("div"))) };
      this.#calls.set(index, call);
    }
    if (called.name) call.text.add(`${called.name} `);
    if (called.arguments) call.text.add(called.arguments);
  }
}
