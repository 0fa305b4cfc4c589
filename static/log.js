// The log of a session as text: what is there, then what comes, while the session lives.
//
// Escape sequences are left out and a carriage return writes the line anew. Nothing is read while
// both parts of the page are closed.
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
  const logPart = document.getElementById("log-part");
  const follow = document.getElementById("log-follow");
  const note = document.getElementById("log-note");
  const screen = document.getElementById("screen");
  const screenPart = document.getElementById("screen-part");
  const decoder = new TextDecoder();
  const NEWLINE = new Uint8Array([10]);
  const tail = document.createTextNode(""); // shows `line`, the one still being written
  let offset = Math.max(0, Number(log.dataset.end) - BEGIN_WITH);
  let carry = "";
  let line = "";
  let shown = 0;
  let timer = null;
  let reading = false;
  const first = offset;
  const said = new Set();
  let marks = []; // what is missing from the log, as far as it has not been said
  let marksStale = true;

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
      shown -= log.firstChild.textContent.length;
      log.firstChild.remove();
    }
  }

  function say(text) {
    decoder.decode(); // half a character or sequence before it is all there is of it
    carry = "";
    if (line) write(NEWLINE);
    const mark = document.createElement("span");
    mark.className = "quiet";
    mark.textContent = `… ${text} …\n`;
    log.insertBefore(mark, tail);
    shown += mark.textContent.length;
  }

  function sizeText(bytes) {
    if (bytes >= 1e6) return `${(bytes / 1e6).toFixed(1)} MB`;
    return bytes >= 1e3 ? `${(bytes / 1e3).toFixed(1)} kB` : `${bytes} bytes`;
  }

  function sayMark({ kind, from, to, why }) {
    said.add(from);
    const size = to === null ? "output" : sizeText(to - Math.max(from, offset));
    say(`${size} ${kind === "removed" ? "removed" : "missing"}: ${why}`);
  }

  async function readMarks() {
    const answer = await fetch(log.dataset.output.replace(/output$/, "marks"));
    if (!answer.ok) throw new Error(`the hub answered ${answer.status}`);
    // One of unknown length may be heard of only after what follows it.
    marks = (await answer.json()).marks.filter(({ from, to }) =>
      to === null ? from >= first && !said.has(from) : to > offset);
    marksStale = false;
  }

  // The bytes that begin at `begins`, with what is missing before and between them.
  function writeMarked(bytes, begins) {
    const end = begins + bytes.length;
    let at = begins;
    while (marks.length && marks[0].from < end) {
      const mark = marks.shift();
      if (mark.from > at) {
        write(bytes.subarray(at - begins, mark.from - begins));
        at = offset = mark.from;
      }
      sayMark(mark);
    }
    write(bytes.subarray(at - begins));
  }

  async function readLog() {
    const answer = await fetch(`${log.dataset.output}?offset=${offset}`);
    if (!answer.ok) throw new Error(`the hub answered ${answer.status}`);
    const bytes = new Uint8Array(await answer.arrayBuffer());
    const begins = Number(answer.headers.get("X-Offset"));
    if (marksStale || begins > offset) await readMarks();
    if (bytes.length || begins !== offset) {
      writeMarked(bytes, begins);
      offset = Number(answer.headers.get("X-Next-Offset"));
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
    clearTimeout(timer);
    timer = null;
    if (reading) return schedule();
    reading = true;
    const live = isLive(); // asked before reading: what came before the end is read once more
    try {
      while (logPart.open && (await readLog()));
      if (screenPart.open) await readScreen();
      note.classList.remove("bad-text");
    } catch (error) {
      note.textContent = `The log could not be read (${error.message}); trying again.`;
      note.classList.add("bad-text");
    }
    reading = false;
    if (live || note.classList.contains("bad-text")) schedule();
  }

  function schedule() {
    if (timer === null && !document.hidden && (logPart.open || screenPart.open)) timer = setTimeout(step, PAUSE);
  }

  for (const part of [logPart, screenPart]) {
    part.addEventListener("toggle", () => part.open && step());
  }
  follow.addEventListener("change", () => {
    if (follow.checked) log.scrollTop = log.scrollHeight;
  });
  log.addEventListener("wheel", (event) => {
    if (event.deltaY < 0) follow.checked = false;
  }, { passive: true });
  document.addEventListener("visibilitychange", schedule);
  document.body.addEventListener("orchestratia:event", (event) => {
    if (!log.dataset.output.includes(event.detail.session_id)) return;
    if (event.detail.type?.startsWith("session_log")) marksStale = true;
    schedule();
  });
  step(); // a part may have been opened before this script was there
})();
