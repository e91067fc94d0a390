// The way to the server: every call carries the API key once there is one, and what went wrong is said in the server's words.

const KEY = "stepgraph-api-key";
const SILENCE_MS = 10_000;
const LONGEST_WAIT_S = 10;

/** An answer that is no success; its message is the server's. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Server {
  #asking = null;

  /** `askKey(wasWrong)` asks the user, and resolves to a key, or to null if there is none. */
  constructor(askKey) {
    this.askKey = askKey;
  }

  /** A successful response. A key is asked for where one is needed; throws ServerError, or TypeError without a connection. */
  async fetch(path, options = {}) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
      const response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
      if (response.ok) return response;
      if (response.status !== 401) throw new ServerError(response.status, await reasonOf(response));
      const newKey = sessionStorage.getItem(KEY);
      if (newKey !== key) continue; // somebody else has asked meanwhile
      if (!(await this.#ask(key !== null))) throw new ServerError(401, "an API key is needed");
    }
  }

  async #ask(wasWrong) {
    this.#asking ??= this.askKey(wasWrong).finally(() => (this.#asking = null));
    const key = await this.#asking;
    if (key !== null) sessionStorage.setItem(KEY, key);
    return key !== null;
  }
}

async function reasonOf(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? body.status ?? `status ${response.status}`;
  } catch {
    return `status ${response.status}`;
  }
}

/** The data of a stream of server-sent events, one string each. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = value.split("\n");
      lines[0] = rest + lines[0];
      rest = lines.pop();
      for (const line of lines) {
        const text = line.endsWith("\r") ? line.slice(0, -1) : line;
        if (text.startsWith("data:")) {
          data.push(text.slice(text[5] === " " ? 6 : 5));
        } else if (text === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}

/** What the engine does, message by message, for as long as the page is open.
 *
 * `onMessage(message)`; `onState(state, text, wait)`: "connecting", "lost" or "key", and what is waited for. A message means that it is connected.
 */
export class Feed {
  #wake = () => {};

  constructor(server, onMessage, onState) {
    this.server = server;
    this.onMessage = onMessage;
    this.onState = onState;
  }

  async run() {
    this.onState("connecting", "Connecting…");
    for (let waited = 0; ; ) {
      let trouble = "The server is gone";
      try {
        await this.#listen(() => (waited = 0));
      } catch (error) {
        if (error.status === 401) {
          this.onState("key", "An API key is needed");
          await this.#sleep(Infinity);
          continue;
        }
        if (error instanceof ServerError) trouble = `No steps: ${error.message}`;
      }
      waited = Math.min(LONGEST_WAIT_S, Math.max(1, 2 * waited));
      for (let left = waited; left > 0; left--) {
        this.onState("lost", trouble, `trying again in ${left} s`);
        if (await this.#sleep(1000)) break;
      }
    }
  }

  /** Try now. */
  retry() {
    this.#wake();
  }

  async #listen(onFirst) {
    const silence = new AbortController();
    const response = await this.server.fetch("ui/events", { signal: silence.signal });
    let timer = setTimeout(() => silence.abort(), SILENCE_MS);
    try {
      for await (const data of eventsOf(response)) {
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), SILENCE_MS);
        const message = JSON.parse(data);
        if (message.type === "hello") onFirst();
        this.onMessage(message);
      }
    } finally {
      clearTimeout(timer);
    }
  }

  /** Resolves after a while, or to true as soon as `retry` is called. */
  #sleep(ms) {
    return new Promise((resolve) => {
      const timer = ms === Infinity ? null : setTimeout(() => resolve(false), ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve(true);
      };
    });
  }
}
