// The page: how its parts hear of each other.

import { Chat } from "./chat.js";
import { several } from "./format.js";
import { Keyboard } from "./keyboard.js";
import { Feed, Server, ServerError } from "./server.js";
import { StepsView } from "./steps_view.js";
import { Store } from "./store.js";
import { Graphs } from "./tables.js";
import { Theme } from "./theme.js";

const $ = (id) => document.getElementById(id);
const GRAPHS_EVERY_MS = 3000;

class Page {
  #stores = [new Store()]; // one for each engine
  #engines = []; // what is known of each
  #engine = 0;
  #clockOffset = 0;
  #graphsAt = null; // the number of the last step when the graphs were asked for

  constructor() {
    this.server = new Server(askKey);
    this.chat = new Chat(this.server, (name) => this.steps.filterBy(name));
    this.steps = new StepsView((name) => this.chat.sent(name));
    this.theme = new Theme($("theme"), () => this.steps.recolour());
    this.graphs = new Graphs($("graphs-table"), $("graphs-note"), (name) => this.steps.filterBy(name));
    this.feed = new Feed(this.server, (message) => this.#hear(message), (...state) => this.#tell(...state));
    this.keyboard = new Keyboard(this.#keys());
    $("export").addEventListener("click", () => this.#export());
    $("connection-retry").addEventListener("click", () => this.feed.retry());
    $("help-open").addEventListener("click", () => $("help").showModal());
    $("engine-select").addEventListener("change", () => this.#choose(Number($("engine-select").value)));
    $("graphs-box").addEventListener("toggle", () => this.#askGraphs());
    document.addEventListener("visibilitychange", () => this.#askGraphs());
    setInterval(() => this.#askGraphs(), GRAPHS_EVERY_MS);
    this.feed.run();
  }

  #hear(message) {
    if (message.type === "hello") return this.#begin(message);
    if (message.type === "engines") return this.#introduce(message.engines);
    if (message.type === "error") throw new ServerError(0, message.error?.message ?? "the stream broke off");
    if (message.type === "steps") {
      this.steps.miss(message.dropped ?? 0);
      this.#sorted(message.steps, (store, steps) => store.addSteps(steps));
    } else if (message.type === "requests") {
      this.#sorted(message.requests, (store, requests) => store.addRequests(requests));
    } else if (message.type !== "gauges" || !this.#stores[message.engine ?? 0]?.addGauges(message)) {
      return; // of a newer server, or nothing new
    }
    this.steps.heard();
  }

  #begin({ engine = {}, engines = [engine], clock = 0 }) {
    this.#stores = engines.map(() => new Store());
    this.#clockOffset = clock;
    this.#introduce(engines);
    this.#look(Math.min(this.#engine, engines.length - 1));
    $("engine-choice").hidden = engines.length < 2;
    $("engine-select").replaceChildren(...engines.map((_, index) => new Option(index, index, false, index === this.#engine)));
  }

  /** Say what serves, or why nothing does: an engine that loads does not know how much it will take. */
  #introduce(engines) {
    this.#engines = engines;
    this.#graphsAt = null; // a new process has graphs of its own
    const { model, device, backend, version, max_num_seqs: seqs, max_num_batched_tokens: tokens } = engines[0];
    $("engine").textContent = [
      model,
      device && backend && backend !== device ? `${device}, ${backend}` : device,
      seqs ? `up to ${several(seqs, "request")}, ${several(tokens, "token")} a step` : null,
      version,
    ].filter(Boolean).join(" · ");
    document.title = model ? `${model} – stepgraph` : "stepgraph";
    this.chat.learnModels().catch(() => {}); // it works without: the server has one model, or says what is wrong
    this.#tellOfEngine();
  }

  #tellOfEngine() {
    const { state, trouble } = this.#engines[this.#engine] ?? this.#engines[0];
    this.#tell(trouble ? state : "live", trouble ? trouble[0].toUpperCase() + trouble.slice(1) : "Live");
  }

  #sorted(things, add) {
    for (const [index, store] of this.#stores.entries()) {
      const own = things.filter((thing) => (thing.engine ?? 0) === index);
      if (own.length) add(store, own);
    }
  }

  #choose(engine) {
    this.#look(engine);
    if (!["connecting", "lost", "key"].includes($("connection").dataset.state)) this.#tellOfEngine();
  }

  #look(engine) {
    if (engine !== this.#engine) this.steps.setPaused(false); // but a connection that comes back leaves a paused view alone
    this.#engine = engine;
    this.#graphsAt = null;
    this.steps.look(this.#stores[engine], this.#clockOffset);
    this.#askGraphs();
  }

  #tell(state, text, wait = "") {
    $("connection").dataset.state = state;
    if ($("connection-text").textContent !== text) $("connection-text").textContent = text; // it is read out, the seconds are not
    $("connection-wait").textContent = wait;
    $("connection-retry").hidden = state !== "lost" && state !== "key";
    $("connection-retry").textContent = state === "key" ? "Enter the key" : "Try now";
  }

  async #askGraphs() {
    const last = this.steps.lastNumber;
    if (document.hidden || this.steps.isPaused || !$("graphs-box").open || last === this.#graphsAt) return;
    if ($("connection").dataset.state !== "live") return;
    this.#graphsAt = last;
    try {
      this.graphs.show(await (await this.server.fetch("graphs")).json(), this.#engine);
    } catch (error) {
      this.#graphsAt = null; // again with the next round
      $("graphs-note").textContent = error instanceof TypeError ? "" : error.message;
    }
  }

  async #export() {
    const say = (text) => ($("step-details").textContent = text);
    $("export").disabled = true;
    try {
      const trace = await (await this.server.fetch("ui/trace")).blob();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(trace);
      link.download = "stepgraph-trace.json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be reading it
      say("Saved stepgraph-trace.json: Perfetto (ui.perfetto.dev) and chrome://tracing open it.");
    } catch (error) {
      say(`No trace: ${error instanceof TypeError ? "the server is gone" : error.message}`);
    }
    $("export").disabled = false;
  }

  #keys() {
    return [
      ["?", "this list", () => $("help").showModal()],
      ["c", "write to the model", () => $("message").focus()],
      ["n", "new chat", () => this.chat.clear()],
      ["Escape", "stop the answer; in a field: leave it", () => this.chat.stop()],
      ["p", "pause, and go on", () => this.steps.setPaused(!this.steps.isPaused)],
      ["f", "follow the latest step", () => this.steps.setFollow(!this.steps.window.follow)],
      ["a", "all steps", () => this.steps.showAll()],
      ["+", "less time in view", () => this.steps.window.zoom(0.5)],
      ["-", "more time in view", () => this.steps.window.zoom(2)],
      ["[", "earlier", () => this.steps.window.pan(-0.25)],
      ["]", "later", () => this.steps.window.pan(0.25)],
      ["ArrowLeft", "the step before", () => this.steps.choose(this.steps.neighbour(-1), true)],
      ["ArrowRight", "the step after", () => this.steps.choose(this.steps.neighbour(1), true)],
      ["/", "filter", () => $("filter").focus()],
      ["x", "no filter", () => this.steps.filterBy("")],
      ["e", "export the trace", () => this.#export()],
      ["d", "dark, light, or as the system", () => this.theme.next()],
    ];
  }
}

/** Ask the user for the API key; null if they would rather not. */
function askKey(wasWrong) {
  const [dialog, input] = [$("key"), $("key-input")];
  input.value = "";
  $("key-error").textContent = wasWrong ? "The server does not take this key." : "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => resolve(dialog.returnValue === "use" && input.value.trim() ? input.value.trim() : null),
      { once: true },
    );
  });
}

new Page();
