// The parts of the page that an event touches are fetched again. The stream of events is one for all
// tabs of the browser (events-worker.js).
//
// A part says what touches it: data-live="task server" (kinds of thing, or "any") and
// data-live-ids="…" (ids of things), data-live-types="…" (types of events); data-live-hidden: even
// while nobody sees the page. However many events come, a part is fetched at once, then again only
// after a pause: as long as the hub asks for (it knows how many look) and longer than the fetch
// itself took. The last event always counts; hx-sync keeps one request in flight.
"use strict";

(() => {
  const PAUSE = 150; // ms, where the hub has not said
  const BREATH = 1.5; // times what a fetch takes
  const KINDS = ["task", "session", "server"];
  const LIVE = "[data-live], [data-live-types]";
  const source = document.querySelector('meta[name="events"]');
  const status = document.getElementById("link");
  const parts = new WeakMap(); // part: {timer, last, stale}
  const away = document.getElementById("away");
  let after = Number(source.dataset.after); // id of the last event the page shows

  function touches(event, part) {
    const ids = (part.dataset.liveIds || "").split(" ").filter(Boolean);
    const about = [event.task_id, event.cause_task_id, event.session_id, event.server_id];
    if (ids.some((id) => about.includes(id))) return true;
    if ((part.dataset.liveTypes || "").split(" ").includes(event.type)) return true;
    const kinds = (part.dataset.live || "").split(" ");
    return (
      kinds.includes("any") ||
      kinds.includes(event.type.split("_")[0]) ||
      KINDS.some((kind) => event[`${kind}_id`] && kinds.includes(kind))
    );
  }

  function refresh(part) {
    const state = parts.get(part) || { timer: null, last: -PAUSE, pause: 0 };
    parts.set(part, state);
    if (state.timer !== null) return;
    const wait = Math.max(0, state.last + state.pause - performance.now());
    state.timer = setTimeout(() => {
      state.timer = null;
      if (!part.isConnected) return;
      if (document.hidden && !("liveHidden" in part.dataset)) {
        state.stale = true;
        return;
      }
      state.last = performance.now();
      htmx.trigger(part, "live");
    }, wait);
  }

  document.addEventListener("htmx:afterRequest", ({ detail }) => {
    const state = parts.get(detail.elt);
    if (!state || detail.requestConfig.verb !== "get") return;
    const asked = Number(detail.xhr.getResponseHeader("X-Live-Pause")) || PAUSE;
    state.pause = Math.max(asked, BREATH * (performance.now() - state.last));
  });

  function refreshAll() {
    document.body.dispatchEvent(new CustomEvent("orchestratia:gap"));
    for (const part of document.querySelectorAll(LIVE)) refresh(part);
  }

  function hear(event) {
    for (const part of document.querySelectorAll(LIVE)) {
      if (touches(event, part)) refresh(part);
    }
    document.body.dispatchEvent(new CustomEvent("orchestratia:event", { detail: event }));
  }

  function show(state, since) {
    if (status.dataset.state !== state) status.dataset.state = state;
    away.hidden = state !== "away";
    if (since) {
      const at = new Date(since).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
      away.querySelector(".since").textContent = at;
    }
  }

  // ── the stream, shared with the other tabs ──

  const hears = {
    state({ state, since, again }) {
      show(state, since);
      if (again) refreshAll();
    },
    event({ id, data }) {
      if (id <= after) return; // the page was read after it
      after = id;
      hear(JSON.parse(data));
    },
    glimpse({ data }) {
      hear({ type: "session_glimpse", ...JSON.parse(data) });
    },
    gap(message) {
      after = message.after;
      refreshAll();
    },
    out() {
      window.location.assign(document.querySelector('meta[name="login"]').content);
    },
  };

  function ownPort() {
    const { port1, port2 } = new MessageChannel();
    serveEvents(port1);
    return port2;
  }

  // Named after the sign-in: who signs in next has a worker, and a stream, of their own.
  function join(lock) {
    if (!window.SharedWorker) return speak(ownPort(), lock);
    try {
      const worker = new SharedWorker(source.dataset.worker, { name: source.dataset.who });
      worker.onerror = () => speak(ownPort(), lock); // its script could not be had
      speak(worker.port, lock);
    } catch {
      speak(ownPort(), lock); // the browser is set to allow none
    }
  }

  function speak(port, lock) {
    const { who, types } = source.dataset;
    port.onmessage = ({ data }) => hears[data.kind](data);
    port.postMessage({ kind: "join", url: source.content, who, types, after, lock });
    window.addEventListener("pagehide", () => port.postMessage({ kind: "leave" }), { once: true });
  }

  // The lock is held as long as the tab lives; without TLS there are none.
  function listen() {
    if (!navigator.locks) return join();
    const lock = `orchestratia-tab-${Math.random().toString(36).slice(2)}-${Date.now()}`;
    navigator.locks.request(lock, () => {
      join(lock);
      return new Promise(() => {});
    });
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    for (const part of document.querySelectorAll(LIVE)) {
      const state = parts.get(part);
      if (!state?.stale) continue;
      state.stale = false;
      refresh(part);
    }
  });
  window.addEventListener("pageshow", (event) => {
    if (event.persisted) window.location.reload(); // from the back/forward cache: all is old
  });

  listen();
})();
