// The log of a session as text: what is there, then what comes, while the session lives.
//
// Escape sequences are left out and a carriage return writes the line anew; the real terminal is
// still to come.
"use strict";

(() => {
  const PAUSE = 1000;
  const BEGIN_WITH = 512 * 1024; // of a long log, the end is read first
  const KEEP = 2_000_000; // characters shown at most
  const LONGEST = 4096; // an unfinished escape sequence longer than this is text
  // CSI, OSC (to BEL or ST), other strings, two-character escapes; then lone controls
  const ESCAPES =
    /\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[PX^_][^\x1b]*\x1b\\|\x1b[ -/]+[0-~]|\x1b[0-Z\\^-~]|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]/g;
  const HALF = /\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*\x1b?|[PX^_][^\x1b]*\x1b?|[ -/]*)?$/;

  const log = document.getElementById("log");
  const follow = document.getElementById("log-follow");
  const note = document.getElementById("log-note");
  const screen = document.getElementById("screen");
  const screenPart = document.getElementById("screen-part");
  const decoder = new TextDecoder();
  const tail = document.createTextNode(""); // shows `line`, the one still being written
  let offset = Math.max(0, Number(log.dataset.end) - BEGIN_WITH);
  let carry = "";
  let line = "";
  let shown = 0;
  let timer = null;

  log.append(tail);
  if (offset > 0) note.textContent = `from byte ${offset.toLocaleString()} on`;

  const isLive = () => document.getElementById("session-state").dataset.liveSession === "yes";

  function lastWritten(text) {
    const parts = text.replace(/\r+$/, "").split("\r");
    return parts[parts.length - 1];
  }

  function write(bytes) {
    const text = carry + decoder.decode(bytes, { stream: true });
    const half = text.match(HALF); // a sequence cut in two waits for its other half
    carry = half && half[0].length < LONGEST ? half[0] : "";
    const plain = text.slice(0, text.length - carry.length).replace(ESCAPES, "");
    const lines = (line + plain).split("\n");
    line = lines.pop();
    tail.data = lastWritten(line);
    if (!lines.length) return;
    const done = `${lines.map(lastWritten).join("\n")}\n`;
    log.insertBefore(document.createTextNode(done), tail);
    shown += done.length;
    while (shown > KEEP && log.firstChild !== tail.previousSibling) {
      shown -= log.firstChild.data.length;
      log.firstChild.remove();
    }
  }

  async function readLog() {
    const answer = await fetch(`${log.dataset.output}?offset=${offset}`);
    if (!answer.ok) throw new Error(`the hub answered ${answer.status}`);
    const bytes = new Uint8Array(await answer.arrayBuffer());
    offset = Number(answer.headers.get("X-Next-Offset"));
    if (bytes.length) {
      write(bytes);
      if (follow.checked) log.scrollTop = log.scrollHeight;
    }
    return bytes.length;
  }

  async function readScreen() {
    const answer = await fetch(log.dataset.screen);
    if (!answer.ok) return;
    const { lines } = await answer.json();
    const text = lines.join("\n").trimEnd();
    if (text && screen.textContent !== text) screen.textContent = text;
  }

  async function step() {
    timer = null;
    const live = isLive(); // asked before reading: what came before the end is read once more
    try {
      while (await readLog());
      if (screenPart.open) await readScreen();
      note.classList.remove("bad-text");
    } catch (error) {
      note.textContent = `The log could not be read (${error.message}); trying again.`;
      note.classList.add("bad-text");
    }
    if (live || note.classList.contains("bad-text")) schedule();
  }

  function schedule() {
    if (timer === null && !document.hidden) timer = setTimeout(step, PAUSE);
  }

  screenPart.addEventListener("toggle", () => screenPart.open && readScreen());
  follow.addEventListener("change", () => {
    if (follow.checked) log.scrollTop = log.scrollHeight;
  });
  log.addEventListener("wheel", (event) => {
    if (event.deltaY < 0) follow.checked = false;
  }, { passive: true });
  document.addEventListener("visibilitychange", schedule);
  document.body.addEventListener("orchestratia:event", (event) => {
    if (log.dataset.output.includes(event.detail.session_id)) schedule();
  });
  step();
})();
