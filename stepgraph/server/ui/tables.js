// The same as the pictures show, as tables; and the graphs. Cells are text nodes.

import { bytes, count, duration, percent, shape, short } from "./format.js";

const MAX_ROWS = 100;

/** Fill a table's body; a row is a list of cells, text or an element. `onRow(index)` is called when its first cell is chosen. */
export function fill(table, rows, onRow = null) {
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, index) => {
    const row = body.rows[index] ?? body.insertRow();
    cells.forEach((cell, place) => {
      const td = row.cells[place] ?? row.insertCell();
      if (place > 0 || !onRow) {
        if (td.textContent !== cell) td.textContent = cell;
        return;
      }
      const button = td.firstElementChild ?? td.appendChild(document.createElement("button"));
      button.type = "button";
      button.className = "link";
      if (button.textContent !== cell) button.textContent = cell;
      button.onclick = () => onRow(index);
    });
  });
}

/** The last of the steps that a timeline shows. */
export function fillSteps(table, shown, choose) {
  const steps = shown.slice(-MAX_ROWS).reverse();
  const rows = steps.map((step) => [
    count(step.n),
    step.kind,
    shape(step.graph),
    count(step.tokens),
    count(step.rows),
    count(step.padding),
    step.proposed > 0 ? `${count(step.accepted)} of ${count(step.proposed)}` : "–",
    micro(step.host_us),
    micro(step.device_us),
    step.reason ?? "",
  ]);
  fill(table, rows, (index) => choose(steps[index]));
}

export function fillRequests(table, requests, latest, choose) {
  const shown = requests.slice(-MAX_ROWS).reverse();
  const rows = shown.map((each) => {
    const decoding = each.first_token == null ? 0 : (each.finished ?? latest) - each.first_token;
    return [
      short(each.name),
      each.state,
      count(each.prompt_tokens),
      count(each.cached_tokens),
      count(each.output_tokens),
      between(each.arrived, each.scheduled),
      between(each.arrived, each.first_token),
      decoding > 0 && each.output_tokens > 1 ? count((each.output_tokens - 1) / decoding) : "–",
      each.finish_reason ?? "",
    ];
  });
  fill(table, rows, (index) => choose(shown[index]));
}

const micro = (microseconds) => (microseconds == null ? "–" : duration(microseconds / 1e6));
const between = (from, to) => (from == null || to == null ? "–" : duration(to - from));

const SORTED_BY = {
  size: (graph) => [graph.num_tokens, graph.num_rows, graph.num_drafts],
  variant: (graph) => [graph.variant],
  uses: (graph) => [graph.uses, graph.num_tokens],
  padding: (graph) => [share(graph)],
  bytes: (graph) => [graph.bytes],
  capture: (graph) => [graph.capture_ms],
};
const share = (graph) => graph.padding_tokens / Math.max(1, graph.real_tokens + graph.padding_tokens);
const nameOf = (graph) => `${graph.num_tokens}×${graph.num_rows}${graph.num_drafts ? `+${graph.num_drafts}` : ""}`;

/** The captured graphs, as /graphs tells of them. */
export class Graphs {
  #graphs = [];
  #sort = "uses";
  #descending = true;

  /** `onGraph(name)` is called when one is chosen. */
  constructor(table, note, onGraph) {
    this.table = table;
    this.note = note;
    this.onGraph = onGraph;
    for (const button of table.tHead.querySelectorAll("button")) {
      button.addEventListener("click", () => this.#sortBy(button.dataset.sort));
    }
  }

  /** What the server says; `engine` is the one that is looked at, where there are several. */
  show(told, engine) {
    const one = told.engines?.[engine] ?? told;
    this.#graphs = one.graphs ?? [];
    const eager = Object.entries(one.eager_reasons ?? {}).map(([reason, number]) => `${reason} ${count(number)}`);
    this.note.textContent = one.error
      ? one.error
      : `${count(this.#graphs.length)} captured${one.bytes ? `, ${bytes(one.bytes)}` : ""} · ${count(one.steps)} steps since the start, ` +
        `${count(one.eager_steps)} of them eager${eager.length ? ` (${eager.join(", ")})` : ""} · ` +
        `${percent(one.padding_tokens, one.real_tokens + one.padding_tokens)} padding`;
    this.#draw();
  }

  #sortBy(column) {
    this.#descending = column === this.#sort ? !this.#descending : true;
    this.#sort = column;
    for (const head of this.table.tHead.querySelectorAll("th")) {
      const isThis = head.firstElementChild.dataset.sort === column;
      head.setAttribute("aria-sort", !isThis ? "none" : this.#descending ? "descending" : "ascending");
    }
    this.#draw();
  }

  #draw() {
    const key = SORTED_BY[this.#sort];
    const sign = this.#descending ? -1 : 1;
    const graphs = [...this.#graphs].sort((a, b) => sign * compared(key(a), key(b)));
    const most = Math.max(1, ...graphs.map((graph) => graph.uses));
    const rows = graphs.map((graph) => [
      nameOf(graph),
      graph.dispatch ? `${graph.variant}, ${graph.dispatch}` : graph.variant,
      count(graph.uses),
      graph.uses ? percent(graph.padding_tokens, graph.real_tokens + graph.padding_tokens) : "–",
      graph.bytes ? bytes(graph.bytes) : "–",
      duration(graph.capture_ms / 1000),
    ]);
    fill(this.table, rows, (index) => this.onGraph(nameOf(graphs[index])));
    graphs.forEach((graph, index) => {
      const cell = this.table.tBodies[0].rows[index].cells[2];
      cell.className = "share";
      cell.style.setProperty("--share", `${(100 * graph.uses) / most}%`);
    });
  }
}

function compared(a, b) {
  for (let place = 0; place < a.length; place++) {
    if (a[place] !== b[place]) return a[place] < b[place] ? -1 : 1;
  }
  return 0;
}
