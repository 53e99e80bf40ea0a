// The page's end of the worker.

export class Engine {
  /** text: id -> the content of a script of the page. failed is called with what went wrong. */
  constructor(text, failed) {
    this.id = 0;
    this.port = startWorker(text("worker"));
    this.port.onerror = ({ message }) => failed(message);
    this.port.onmessage = ({ data }) => this.answer(data);
    this.ready = this.run("open", {
      checkpoint: text("checkpoint"),
      alphaBar: text("alpha-bar"),
    });
  }

  /** Runs a job; onResult gets each result. Resolves to { milliseconds, passes } at the end, or to
   * null if a newer job ended it. */
  async run(job, options = {}, onResult = () => {}) {
    if (job !== "open") await this.ready;
    this.finish?.(null);
    this.onResult = onResult;
    const done = new Promise((resolve) => (this.finish = resolve));
    this.port.postMessage({ id: ++this.id, job, ...options });
    return done;
  }

  answer({ id, result, done, ...times }) {
    if (id !== this.id) return;
    if (done) this.finish(times);
    else this.onResult(result);
  }
}

/** A worker from its source; where the browser allows none, a channel to the page itself. */
function startWorker(source) {
  try {
    const code = new Blob([source, "\nserve(self);"], { type: "text/javascript" });
    return new Worker(URL.createObjectURL(code));
  } catch {
    const { port1, port2 } = new MessageChannel();
    new Function("port", `${source}\nserve(port);`)(port2);
    return port1;
  }
}
