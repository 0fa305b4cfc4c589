// One stream of events for the page; the parts of it that an event touches are fetched again.
//
// A part says what touches it: data-live="task server" (kinds of thing, or "any") and
// data-live-ids="…" (ids of things), data-live-types="…" (types of events); data-live-hidden: even
// while nobody sees the page. However many events come, a part is fetched at once, then at
// most every PAUSE ms, and the last event always counts; hx-sync keeps one request in flight.
"use strict";

(() => {
  const PAUSE = 150;
  const KINDS = ["task", "session", "server"];
  const LIVE = "[data-live], [data-live-types]";
  const source = document.querySelector('meta[name="events"]');
  const status = document.getElementById("link");
  const parts = new WeakMap(); // part: {timer, last, stale}
  let opened = false;

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
    const state = parts.get(part) || { timer: null, last: -PAUSE };
    parts.set(part, state);
    if (state.timer !== null) return;
    const wait = Math.max(0, state.last + PAUSE - performance.now());
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

  function refreshAll() {
    for (const part of document.querySelectorAll(LIVE)) refresh(part);
  }

  function hear(message) {
    const event = JSON.parse(message.data);
    for (const part of document.querySelectorAll(LIVE)) {
      if (touches(event, part)) refresh(part);
    }
    document.body.dispatchEvent(new CustomEvent("orchestratia:event", { detail: event }));
  }

  function show(state) {
    if (status.dataset.state !== state) status.dataset.state = state;
  }

  async function askWhy() {
    // the browser gives a stream up when it is refused: signed out, or the hub is starting
    try {
      const me = await fetch(source.content.replace("/events/stream", "/auth/me"));
      if (me.status === 401) return window.location.assign(document.querySelector('meta[name="login"]').content);
    } catch {
      // the hub is away; try again below
    }
    setTimeout(listen, 2000);
  }

  function listen() {
    const stream = new EventSource(`${source.content}?after=${source.dataset.after}`);
    stream.onopen = () => {
      show("live");
      if (opened) refreshAll();
      opened = true;
    };
    stream.onerror = () => {
      show("away");
      if (stream.readyState === EventSource.CLOSED) askWhy();
    };
    for (const type of source.dataset.types.split(" ")) {
      stream.addEventListener(type, (message) => {
        source.dataset.after = message.lastEventId;
        hear(message);
      });
    }
    window.addEventListener("pagehide", () => stream.close(), { once: true });
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
