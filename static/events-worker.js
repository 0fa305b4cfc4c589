// The stream of events: one for all tabs of a browser (as a SharedWorker), or one for a page in a
// browser without such workers (live.js then serves itself).
//
// A tab says {kind: "join", url, who, after, types, lock} and {kind: "leave"}. It hears
// {kind: "state", state, since, again}, {kind: "event", id, data}, {kind: "glimpse", data} of what a
// session does now, {kind: "gap", after} when it
// has to read anew, and {kind: "out"} when its person is not signed in any more.
"use strict";

globalThis.serveEvents = (() => {
  const AGAIN = 2000; // ms before a stream that was refused is asked for again
  const KEPT = 500; // events for tabs whose page is older than the last one
  const tabs = new Set();
  let stream = null;
  let retry = null;
  let address = null; // {url, who, types} of this browser's person
  let state = { kind: "state", state: "connecting" };
  let opened = false;
  let last = 0; // id of the last event heard
  let covered = 0; // every event above it is among the kept ones
  let kept = [];

  function tell(message) {
    for (const tab of tabs) tab.postMessage(message);
  }

  function show(word, more = {}) {
    if (state.state === "away" && word === "away") return;
    state = { kind: "state", state: word, ...more };
    tell(state);
  }

  function hear(message) {
    last = Number(message.lastEventId);
    const event = { kind: "event", id: last, data: message.data };
    kept.push(event);
    if (kept.length > KEPT) covered = kept.shift().id;
    tell(event);
  }

  // The hub's log is another one now (an older copy of its database).
  function begin(message) {
    last = covered = Number(message.lastEventId);
    kept = [];
    tell({ kind: "gap", after: last });
  }

  function where() {
    return `${address.url}?${new URLSearchParams({ after: last, who: address.who })}`;
  }

  function listen() {
    retry = null;
    const opening = new EventSource(where());
    stream = opening;
    opening.onopen = () => {
      show("live", { again: opened });
      opened = true;
    };
    opening.onerror = () => {
      show("away", { since: Date.now() });
      if (opening.readyState === EventSource.CLOSED) askWhy(opening);
    };
    opening.addEventListener("reset", begin);
    opening.addEventListener("glimpse", ({ data }) => tell({ kind: "glimpse", data }));
    for (const type of address.types.split(" ")) opening.addEventListener(type, hear);
  }

  // The browser gives a stream up when it is refused: the person is out, or the hub not yet up.
  async function askWhy(refused) {
    let status = 0;
    try {
      status = (await fetch(where(), { method: "HEAD" })).status;
    } catch {
      // the hub is away; it is asked again below
    }
    if (stream !== refused) return; // all tabs have gone meanwhile
    if (status === 401) {
      tell({ kind: "out" });
      stop();
    } else {
      retry = setTimeout(listen, AGAIN);
    }
  }

  function stop() {
    stream?.close();
    clearTimeout(retry);
    stream = retry = null;
    opened = false;
    kept = [];
    tabs.clear();
  }

  function leave(tab) {
    tabs.delete(tab);
    if (!tabs.size) stop();
  }

  function join(tab, message) {
    tabs.add(tab);
    if (stream) return catchUp(tab, message.after);
    address = message;
    last = covered = message.after;
    state = { kind: "state", state: "connecting" };
    listen();
  }

  function catchUp(tab, after) {
    tab.postMessage({ ...state, again: false });
    if (after < covered) return tab.postMessage({ kind: "gap", after: last });
    for (const event of kept) if (event.id > after) tab.postMessage(event);
  }

  return (tab) => {
    tab.onmessage = ({ data }) => {
      if (data.kind === "leave") return leave(tab);
      join(tab, data);
      // A tab that dies without a word lets go of its lock.
      if (data.lock) navigator.locks.request(data.lock, () => leave(tab));
    };
  };
})();

globalThis.onconnect = ({ ports: [tab] }) => serveEvents(tab);
