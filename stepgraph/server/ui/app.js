// The page: what is shown, and how its parts hear of each other.

import { Chat } from "./chat.js";
import { clock, count, duration, percent, several, shape, short } from "./format.js";
import { Gauges } from "./gauges.js";
import { Keyboard } from "./keyboard.js";
import { colourOf, palette } from "./plot.js";
import { Feed, Server } from "./server.js";
import { Filter, Store, endOf } from "./store.js";
import { Graphs, fillRequests, fillSteps } from "./tables.js";
import { Theme } from "./theme.js";
import { TimeWindow, movesWindow } from "./time_window.js";
import { Timeline } from "./timeline.js";
import { Waterfall, inView } from "./waterfall.js";

const $ = (id) => document.getElementById(id);
const GRAPHS_EVERY_MS = 3000;
const KINDS = ["prefill", "mixed", "decode"];
const NAMED = 8; // requests that the details of a step name

class Page {
  #stores = [new Store()]; // one for each engine
  #engines = [];
  #engine = 0;
  #frozen = null; // a copy of the store that is looked at, while the page is paused
  #clockOffset = 0;
  #missed = 0;
  #chosen = null; // a step
  #frame = 0;
  #graphsAt = -1; // the number of the last step when the graphs were asked for
  #filter = new Filter();
  #window = new TimeWindow(() => this.#changed());

  constructor() {
    this.server = new Server(askKey);
    this.theme = new Theme($("theme"), () => this.#recolour());
    this.chat = new Chat(this.server, (name) => this.#filterBy(name));
    this.timeline = new Timeline($("timeline"));
    this.gauges = new Gauges($("gauges"), $("gauges-now"));
    this.waterfall = new Waterfall($("waterfall"), $("requests-note"));
    this.graphs = new Graphs($("graphs-table"), $("graphs-note"), (name) => this.#filterBy(name.replace("×", "x")));
    this.feed = new Feed(this.server, (message) => this.#hear(message), (state, text) => this.#tell(state, text));
    this.colours = palette();
    this.#wire();
    this.keyboard = new Keyboard(this.#keys());
    this.feed.run();
    setInterval(() => this.#askGraphs(), GRAPHS_EVERY_MS);
  }

  get #live() {
    return this.#stores[this.#engine];
  }

  get #shown() {
    return this.#frozen ?? this.#live;
  }

  // What the server says.

  #hear(message) {
    if (message.type === "hello") this.#begin(message);
    else if (message.type === "steps") {
      this.#missed += message.dropped ?? 0;
      this.#sorted(message.steps, (store, steps) => store.addSteps(steps));
    } else if (message.type === "requests") this.#sorted(message.requests, (store, requests) => store.addRequests(requests));
    else if (message.type === "gauges") {
      if (!this.#stores[message.engine ?? 0]?.addGauges(message)) return;
    } else return; // of a newer server
    if (!this.#frozen) this.#changed();
    else this.#note();
  }

  #begin({ engine = {}, engines = [engine], clock: offset = 0 }) {
    this.#engines = engines;
    this.#engine = Math.min(this.#engine, engines.length - 1);
    this.#stores = engines.map(() => new Store());
    this.#clockOffset = offset;
    this.#missed = 0;
    this.#chosen = null;
    this.#graphsAt = -1;
    this.#setPaused(false);
    const { model, device, backend, version, max_num_seqs: seqs, max_num_batched_tokens: tokens } = engine;
    $("engine").textContent = [
      model,
      device && backend && backend !== device ? `${device}, ${backend}` : device,
      seqs ? `up to ${several(seqs, "request")}, ${several(tokens, "token")} a step` : null,
      version,
    ].filter(Boolean).join(" · ");
    document.title = model ? `${model} – stepgraph` : "stepgraph";
    $("engine-choice").hidden = engines.length < 2;
    $("engine-select").replaceChildren(...engines.map((_, index) => new Option(index, index, false, index === this.#engine)));
    this.chat.learnModels().catch(() => {}); // it works without: the server has one model, or says what is wrong
    this.#askGraphs();
  }

  #sorted(things, add) {
    for (const [index, store] of this.#stores.entries()) {
      const own = things.filter((thing) => (thing.engine ?? 0) === index);
      if (own.length) add(store, own);
    }
  }

  #tell(state, text) {
    $("connection").dataset.state = state;
    $("connection-text").textContent = text;
    $("connection-retry").hidden = state !== "lost" && state !== "key";
    $("connection-retry").textContent = state === "key" ? "Enter the key" : "Try now";
  }

  async #askGraphs() {
    const last = this.#live.steps.length ? this.#live.steps.at(-1).n : 0;
    if (document.hidden || this.#frozen || !$("graphs-box").open || last === this.#graphsAt) return;
    if ($("connection").dataset.state !== "live") return;
    this.#graphsAt = last;
    try {
      this.graphs.show(await (await this.server.fetch("graphs")).json(), this.#engine);
    } catch (error) {
      this.#graphsAt = -1; // again with the next round
      $("graphs-note").textContent = error instanceof TypeError ? "" : error.message;
    }
  }

  // What is drawn: at most once a frame, and only if something has changed and somebody can see it.

  #changed() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const store = this.#shown;
    if (!this.#frozen) this.#window.keepUp(store.latest);
    const drawn = {
      store,
      window: this.#window,
      filter: this.#filter,
      clockOffset: this.#clockOffset,
      colours: this.colours,
      chosen: this.#chosen,
      mine: (name) => this.chat.sent(name),
    };
    this.timeline.draw(drawn);
    this.gauges.draw(drawn);
    this.waterfall.draw(drawn);
    this.#total();
    this.#note();
    this.#drawKinds();
    if ($("steps-table-box").open) fillSteps($("steps-table"), this.timeline.shown, (step) => this.#choose(step));
    if ($("requests-table-box").open) {
      const requests = this.#filter.requests(inView(store, this.#window));
      fillRequests($("requests-table"), requests, store.latest, (request) => this.#filterBy(request.name));
    }
    $("follow").setAttribute("aria-pressed", String(this.#window.follow));
  }

  #total() {
    const sums = { tokens: 0, padding: 0, proposed: 0, accepted: 0, eager: 0, device: 0 };
    const { shown } = this.timeline;
    for (const step of shown) {
      sums.tokens += step.tokens;
      sums.padding += step.padding;
      sums.proposed += step.proposed;
      sums.accepted += step.accepted;
      sums.eager += Number(step.reason !== null);
      sums.device += step.device_us ?? 0;
    }
    const span = shown.length ? endOf(shown.at(-1)) - shown[0].start : 0;
    const facts = [
      ["Steps in view", count(shown.length)],
      ["In a graph", percent(shown.length - sums.eager, shown.length)],
      ["Tokens", count(sums.tokens)],
      ["Padding", percent(sums.padding, sums.tokens + sums.padding)],
      ["Proposals accepted", sums.proposed ? percent(sums.accepted, sums.proposed) : "none made"],
      ["Device busy", span > 0 ? `${Math.min(100, sums.device / 1e4 / span).toFixed(0)} %` : "–"],
    ];
    const list = $("totals");
    facts.forEach(([name, value], index) => {
      const pair = list.children[index] ?? list.appendChild(document.createElement("div"));
      if (!pair.childElementCount) pair.append(document.createElement("dt"), document.createElement("dd"));
      pair.firstElementChild.textContent = name;
      if (pair.lastElementChild.textContent !== value) pair.lastElementChild.textContent = value;
    });
  }

  #note() {
    const behind = this.#frozen ? this.#countSince() : 0;
    $("steps-note").textContent = [
      this.#frozen ? `paused${behind ? `, ${behind} new` : ""}` : null,
      `${count(this.#shown.steps.length)} kept`,
      this.#missed ? `${count(this.#missed)} missed, as this page was too slow` : null,
    ].filter(Boolean).join(" · ");
  }

  #countSince() {
    const [live, frozen] = [this.#live.steps, this.#frozen.steps];
    const last = frozen.length ? frozen.at(-1).n : -1;
    const since = live.length - live.firstFrom(last + 1, (step) => step.n);
    return since === live.capacity ? `${count(since)} or more` : since && count(since);
  }

  #drawKinds() {
    const seen = new Set(KINDS);
    for (const step of this.timeline.shown) seen.add(step.kind);
    for (const kind of seen) {
      if ($("kinds").querySelector(`[data-kind="${CSS.escape(kind)}"]`)) continue;
      $("kinds").append(this.#chip(kind, () => toggled(this.#filter.hidden, kind)));
    }
    if ($("kinds").querySelector('[data-kind="eager only"]')) return;
    $("kinds").append(this.#chip("eager only", () => (this.#filter.eagerOnly = !this.#filter.eagerOnly), false));
  }

  #chip(name, toggle, pressed = true) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.dataset.kind = name;
    chip.setAttribute("aria-pressed", String(pressed));
    const swatch = chip.appendChild(document.createElement("span"));
    swatch.className = "swatch";
    swatch.style.background = name === "eager only" ? "var(--eager)" : colourOf({
      prefill: "var(--prefill)", decode: "var(--decode)", mixed: "var(--mixed)", other: "var(--other)",
    }, name);
    chip.append(name);
    chip.addEventListener("click", () => {
      toggle();
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      this.#changed();
    });
    return chip;
  }

  #recolour() {
    this.colours = palette();
    this.#changed();
  }

  // What the user does.

  #wire() {
    const on = (id, kind, handle) => $(id).addEventListener(kind, handle);
    on("pause", "click", () => this.#setPaused(!this.#frozen));
    on("follow", "click", () => this.#setFollow(!this.#window.follow));
    on("zoom-in", "click", () => this.#window.zoom(0.5));
    on("zoom-out", "click", () => this.#window.zoom(2));
    on("fit", "click", () => this.#showAll());
    on("export", "click", () => this.#export());
    on("filter", "input", () => this.#setFilter());
    on("connection-retry", "click", () => this.feed.retry());
    on("help-open", "click", () => $("help").showModal());
    on("engine-select", "change", () => this.#look(Number($("engine-select").value)));
    for (const id of ["steps-table-box", "requests-table-box"]) on(id, "toggle", () => this.#changed());
    on("graphs-box", "toggle", () => this.#askGraphs());
    document.addEventListener("visibilitychange", () => this.#askGraphs());
    new ResizeObserver(() => this.#changed()).observe($("plots"));
    for (const [id, part] of [["timeline", this.timeline], ["gauges", this.gauges], ["waterfall", this.waterfall]]) {
      movesWindow($(id), this.#window, (clientX) => part.plot.shareOf(clientX));
    }
    on("timeline", "pointermove", (event) => {
      if (event.buttons) return;
      const step = this.timeline.stepAt(event.offsetX);
      if (step) this.#describe(step);
    });
    on("timeline", "pointerleave", () => this.#describe(this.#chosen));
    on("timeline", "click", (event) => {
      if ($("timeline").dataset.dragged !== "true") this.#choose(this.timeline.stepAt(event.offsetX));
    });
    on("timeline", "keydown", (event) => this.#timelineKey(event));
    on("waterfall", "pointermove", (event) => this.waterfall.tellOf(this.waterfall.requestAt(event.offsetX, event.offsetY)));
    on("waterfall", "click", (event) => {
      const request = this.waterfall.requestAt(event.offsetX, event.offsetY);
      if (request && $("waterfall").dataset.dragged !== "true") this.#filterBy(this.#filter.text ? "" : request.name);
    });
  }

  #keys() {
    return [
      ["?", "this list", () => $("help").showModal()],
      ["c", "write to the model", () => $("message").focus()],
      ["n", "new chat", () => this.chat.clear()],
      ["Escape", "stop the answer; in a field: leave it", () => this.chat.stop()],
      ["p", "pause, and go on", () => this.#setPaused(!this.#frozen)],
      ["f", "follow the latest step", () => this.#setFollow(!this.#window.follow)],
      ["a", "all steps", () => this.#showAll()],
      ["+", "less time in view", () => this.#window.zoom(0.5)],
      ["-", "more time in view", () => this.#window.zoom(2)],
      ["[", "earlier", () => this.#window.pan(-0.25)],
      ["]", "later", () => this.#window.pan(0.25)],
      ["ArrowLeft", "the step before, from anywhere outside fields", () => this.#choose(this.#neighbour(-1), true)],
      ["ArrowRight", "the step after", () => this.#choose(this.#neighbour(1), true)],
      ["/", "filter", () => $("filter").focus()],
      ["x", "no filter", () => this.#filterBy("")],
      ["e", "export the trace", () => this.#export()],
      ["d", "dark, light, or as the system", () => this.theme.next()],
    ];
  }

  #timelineKey(event) {
    const shown = this.timeline.shown ?? [];
    const step = { Home: shown[0], End: shown.at(-1) }[event.key];
    if (!step) return;
    event.preventDefault();
    this.#choose(step, true);
  }

  #neighbour(direction) {
    const { steps } = this.#shown;
    if (!steps.length) return null;
    const matches = this.#filter.forSteps(this.#shown);
    const shown = this.timeline.shown ?? [];
    if (!this.#chosen) return (direction > 0 ? shown[0] : shown.at(-1)) ?? null;
    let index = steps.firstFrom(this.#chosen.n, (step) => step.n) + direction;
    while (index >= 0 && index < steps.length && !matches(steps.at(index))) index += direction;
    return steps.at(Math.max(0, Math.min(steps.length - 1, index)));
  }

  #choose(step, bringIntoView = false) {
    this.#chosen = step;
    if (step && bringIntoView) this.#window.include(step.start);
    if (step && !this.#frozen && this.#window.follow) this.#window.setFollow(false); // it would run away
    this.#describe(step);
    this.#changed();
  }

  #describe(step) {
    $("step-details").textContent = step
      ? this.#sentence(step)
      : "Point at a step, or choose one with ← and →.";
  }

  #sentence(step) {
    const requests = step.requests ?? [];
    const named = requests.slice(0, NAMED).map(([id, tokens]) => {
      const name = this.#shown.requests.get(id)?.name;
      return `${name ? short(name) : `#${id}`} ${count(tokens)}`;
    });
    return [
      `Step ${count(step.n)} at ${clock(step.start + this.#clockOffset, 3)}`,
      step.kind,
      step.graph === null ? `eager (${step.reason})` : `graph ${shape(step.graph)}`,
      `${several(step.tokens, "token")} in ${several(step.rows, "row")}, ${count(step.padding)} padding`,
      step.proposed > 0 ? `${count(step.accepted)} of ${several(step.proposed, "proposal")} accepted` : null,
      step.host_us == null ? null : `host ${duration(step.host_us / 1e6)}`,
      step.device_us == null ? null : `device ${duration(step.device_us / 1e6)}`,
      step.captured ? "its graph was captured now" : null,
      named.length ? `requests: ${named.join(", ")}${requests.length > NAMED ? ", …" : ""}` : null,
    ].filter(Boolean).join(" · ");
  }

  #setPaused(paused) {
    this.#frozen = paused ? this.#live.copy() : null;
    $("pause").setAttribute("aria-pressed", String(paused));
    $("pause").textContent = paused ? "Go on" : "Pause";
    this.#changed();
  }

  #setFollow(follow) {
    if (follow) {
      this.#chosen = null;
      this.#describe(null);
      if (this.#frozen) this.#setPaused(false);
    }
    this.#window.setFollow(follow);
  }

  #showAll() {
    const { steps, latest } = this.#shown;
    if (steps.length) this.#window.show(steps.at(0).start, Math.max(latest, endOf(steps.at(-1))));
  }

  #filterBy(text) {
    $("filter").value = text;
    this.#setFilter();
    if (!text || !this.#shown.steps.length) return;
    const { steps } = this.#shown;
    const matches = this.#filter.forSteps(this.#shown);
    let [first, last] = [null, null];
    for (let index = 0; index < steps.length; index++) {
      if (!matches(steps.at(index))) continue;
      first ??= steps.at(index);
      last = steps.at(index);
    }
    if (first) this.#window.show(first.start, endOf(last));
  }

  #setFilter() {
    this.#filter.text = $("filter").value.trim().toLowerCase().replace("×", "x");
    this.#changed();
  }

  #look(engine) {
    this.#engine = engine;
    this.#chosen = null;
    this.#graphsAt = -1;
    this.#setPaused(false);
    this.#askGraphs();
  }

  async #export() {
    $("export").disabled = true;
    try {
      const trace = await (await this.server.fetch("ui/trace")).blob();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(trace);
      link.download = "stepgraph-trace.json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be reading it
      $("step-details").textContent = "Saved stepgraph-trace.json: Perfetto (ui.perfetto.dev) and chrome://tracing open it.";
    } catch (error) {
      $("step-details").textContent = `No trace: ${error instanceof TypeError ? "the server is gone" : error.message}`;
    }
    $("export").disabled = false;
  }
}

function toggled(set, name) {
  if (!set.delete(name)) set.add(name);
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
