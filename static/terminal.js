// The terminal of a session: draws what the hub sends, sends what is typed.
//
// Everybody draws the session's own size, the text made smaller where the window is narrow; only
// the one who owns the size changes it. Every piece of output has an offset: after a break it goes
// on there, or begins anew with a repaint, so nothing is missing or drawn twice. Keys that cannot
// arrive now are refused aloud, never kept for later.
import { Unicode11Addon } from "./vendor/addon-unicode11.mjs";
import { Terminal } from "./vendor/xterm.mjs";
import { Search, findBar, inTerminal, inText } from "./terminal-find.js";
import { keyBar } from "./terminal-keys.js";

const part = document.getElementById("terminal-part");
const box = document.getElementById("terminal-box");
const at = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ── drawing ──────────────────────────────────────────────────────────────────────────────────────

const LINE_HEIGHT = 1.2;
const SCROLLBACK = 5000; // lines; tmux uses a screen without
const ANSI = {
  black: "#3a3531", red: "#e5786d", green: "#8fbf7f", yellow: "#e0b35c",
  blue: "#7aa6da", magenta: "#c39ac9", cyan: "#5cc9b4", white: "#d8d0c4",
  brightBlack: "#8f867a", brightRed: "#ff9a91", brightGreen: "#a9d699", brightYellow: "#f2cd7c",
  brightBlue: "#9dc1ea", brightMagenta: "#d9b5de", brightCyan: "#86dfcd", brightWhite: "#ffffff",
};
const MOST_PENDING = 2_000_000; // bytes the terminal may have yet to draw

const term = new Terminal({
  allowProposedApi: true, // Unicode 11 is one
  fontFamily: style("--mono"),
  lineHeight: LINE_HEIGHT,
  logLevel: "off", // what a program prints is no concern of the browser's console
  minimumContrastRatio: 4.5,
  scrollback: SCROLLBACK,
  screenReaderMode: localStorage.getItem("terminal-reader") === "on",
  theme: theme(),
});
let expected = null; // offset of the first byte not yet taken
let pending = 0;
let behind = false; // too much was pending: nothing is taken before the next repaint
let dropped = 0;

function theme() {
  const [background, foreground] = [style("--term"), style("--term-text")];
  const selection = { selectionBackground: "#5a6f6a", selectionForeground: "#ffffff" };
  return { ...ANSI, background, foreground, cursor: "#5cc9b4", cursorAccent: background, ...selection };
}

// Nobody's terminal answers a program: several may look on, and what they say would be typed.
// Nor does a program change the page's colours, title or clipboard, or make links.
function takeNoOrders({ parser }) {
  const deaf = () => true;
  const questions = ["c", ">c", "=c", "n", "?n", "$p", "?$p", "t", ">q", "x"];
  for (const question of questions) {
    const [, prefix, intermediates, final] = question.match(/^([?>=]?)(\$?)(.)$/);
    parser.registerCsiHandler({ prefix, intermediates, final }, deaf);
  }
  parser.registerDcsHandler({ intermediates: "$", final: "q" }, deaf);
  for (const order of [0, 1, 2, 4, 5, 8, 10, 11, 12, 52, 104, 110, 111, 112]) {
    parser.registerOscHandler(order, deaf);
  }
}

function drawOutput({ data, offset, repaint, skipped }) {
  let bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  const end = offset + bytes.length;
  if (behind && !(repaint && pending === 0)) {
    dropped += bytes.length;
    return;
  }
  if (repaint) {
    term.write("", () => term.reset());
    if (skipped || dropped) showMark(skipped || dropped);
    behind = false;
    dropped = 0;
  } else if (expected === null || offset > expected) {
    return beginAnew();
  } else {
    bytes = bytes.subarray(expected - offset);
    if (!bytes.length) return;
  }
  expected = end;
  painted = true;
  pending += bytes.length;
  term.write(bytes, () => {
    pending -= bytes.length;
    if (behind && pending === 0) beginAnew();
  });
  if (pending > MOST_PENDING) behind = true;
}

function beginAnew() {
  behind = true;
  expected = null;
  send({ type: "resume", offset: null });
}

function showMark(bytes) {
  const mark = at("terminal-mark");
  const size = bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
  mark.textContent = `skipped ${size} to keep up`;
  const fade = [{ opacity: 1 }, { opacity: 1, offset: 0.8 }, { opacity: 0 }];
  mark.animate(fade, { duration: 6000 }).onfinish = () => mark.replaceChildren();
}

// ── its size ─────────────────────────────────────────────────────────────────────────────────────

const LEAST_FONT = 9; // below it the terminal scrolls sideways
const LEAST_SIZE = [20, 8];
const MOST_SIZE = 500;
const BAR = 96; // px of the page's own above the terminal, and some air
const SETTLE = 200; // ms a window keeps its size before the session takes it
let size = null; // the hub's last word: {cols, rows, owner, yours}
let offering = true; // to fit the session to this window, if nobody else has
let ours = null; // the size as we owned it when the connection broke
let settling = null;

const ownFont = () => (window.matchMedia("(max-width: 42rem)").matches ? 12 : 13);

// Width and height of a character, as the terminal measures them too.
function cell(font) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = `${font}px ${term.options.fontFamily}`;
  const letter = context.measureText("W");
  const tall = (letter.fontBoundingBoxAscent + letter.fontBoundingBoxDescent) * window.devicePixelRatio;
  return [letter.width, Math.floor(Math.ceil(tall) * LINE_HEIGHT) / window.devicePixelRatio];
}

// The width there is for the terminal, however wide it is now.
function room() {
  const { paddingLeft, paddingRight, borderLeftWidth, borderRightWidth } = getComputedStyle(box);
  const sides = [paddingLeft, paddingRight, borderLeftWidth, borderRightWidth].map(parseFloat);
  return part.clientWidth - sides.reduce((sum, side) => sum + side);
}

function scale() {
  const fitting = (ownFont() * room()) / (cell(ownFont())[0] * term.cols);
  const font = Math.min(ownFont(), Math.max(LEAST_FONT, Math.floor(fitting * 4) / 4));
  if (font !== term.options.fontSize) term.options.fontSize = font;
}

// As many columns and rows as the window shows of it at once.
function fit() {
  const [width, height] = cell(ownFont());
  const around = part.querySelector("header").offsetHeight + BAR;
  const wanted = [room() / width, (window.innerHeight - around) / height];
  const [cols, rows] = wanted.map((n, i) => Math.min(MOST_SIZE, Math.max(LEAST_SIZE[i], Math.floor(n))));
  return { cols, rows };
}

function takeSize(frame) {
  size = frame;
  term.write("", () => {
    term.resize(frame.cols, frame.rows);
    scale();
  });
  const whose = frame.yours ? ", your size" : frame.owner ? `, size by ${frame.owner}` : "";
  at("terminal-size").textContent = `${frame.cols}×${frame.rows}${whose}`;
  offerSize();
  showStanding();
}

function offerSize() {
  if (!offering || !size || !mayType() || !isReachable()) return;
  offering = false;
  // of a connection that broke the hub may not know yet: then the owner it names is us
  const isOurs = ours && ["owner", "cols", "rows"].every((name) => ours[name] === size[name]);
  if (!size.owner || isOurs) send({ type: isOurs ? "take_size" : "resize", ...fit() });
}

function windowChanged() {
  scale();
  if (!size?.yours || !isReachable()) return;
  const wanted = fit();
  if (wanted.cols !== size.cols || wanted.rows !== size.rows) send({ type: "resize", ...wanted });
}

// ── what is typed ────────────────────────────────────────────────────────────────────────────────

const PIECE = 256 * 1024; // bytes of a long paste in one message
const FOCUS = /^\x1b\[[IO]$/; // whether this window has the focus is no concern of the session's
const MOUSE = /^\x1b\[[M<]/;
const CONTROLS = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]/g;

const mayType = () => Boolean(session?.may_type) && !over;
const isReachable = () => Boolean(session?.server_online && session.connected) && REACHABLE.has(session.status);

function whyNot() {
  if (over) return "Nothing was typed: the session is over.";
  if (!isOpen()) return "Nothing was typed: the hub cannot be reached now. This page goes on by itself when it is back.";
  if (!mayType()) return "Nothing was typed: you may watch this session, not type into it.";
  return null; // whether the session's server takes it the hub knows
}

function type(bytes) {
  for (let start = 0; start < bytes.length; start += PIECE) {
    const piece = bytes.subarray(start, start + PIECE);
    const chars = Array.from(piece, (byte) => String.fromCharCode(byte));
    send({ type: "input", data: btoa(chars.join("")) });
  }
}

function typed(data, bytes) {
  if (FOCUS.test(data)) return;
  const refusal = whyNot();
  if (!refusal) type(bytes());
  if (MOUSE.test(data)) return;
  if (refusal) say(refusal);
  box.scrollIntoView({ block: "nearest" });
}

function leave() {
  term.blur();
  at("terminal-help").focus();
}

// Whether the key is the terminal's, and not the page's or the browser's.
function isForSession(event) {
  if (event.key === "Escape" && event.shiftKey) {
    event.preventDefault();
    if (event.type === "keydown") leave();
    return false;
  }
  if (event.key === "Tab" && !mayType()) return false;
  if (isFind(event)) return false; // the page's
  const isCopy = event.ctrlKey && !event.altKey && event.key.toLowerCase() === "c";
  if (!isCopy || !(term.hasSelection() || event.shiftKey)) return true;
  event.preventDefault();
  if (event.type === "keydown" && term.hasSelection()) copySelection();
  return false;
}

function copySelection() {
  term.textarea.value = term.getSelection();
  term.textarea.select();
  document.execCommand("copy"); // unlike the clipboard's own interface it works without TLS
  term.textarea.value = "";
  term.clearSelection();
}

function paste(event) {
  event.preventDefault();
  event.stopPropagation();
  pasteText(event.clipboardData.getData("text/plain"));
}

function pasteText(text) {
  if (text) term.paste(text.replace(CONTROLS, ""));
}

// Where the page may not read the clipboard (no TLS, or it was denied) a field takes the text.
async function askPaste() {
  try {
    pasteText(await navigator.clipboard.readText());
  } catch {
    at("paste-text").value = "";
    at("paste").returnValue = "";
    at("paste").showModal();
  }
}

function takePaste() {
  const text = at("paste-text").value;
  at("paste-text").value = "";
  if (at("paste").returnValue !== "type") return;
  pasteText(text);
  term.focus();
}

// ── the connection ───────────────────────────────────────────────────────────────────────────────

const LONGEST = 10_000; // ms between two attempts
const SIGNED_OUT = 4401;
const FINAL = new Set([4403, 4404]); // trying again would not help
const HEARD = { state: takeState, size: takeSize, output: drawOutput, scrollback: showScrollback, error: refused, closed: ended };
let socket = null;
let attempts = 0; // since it was open last
let retry = null;
let over = false; // nothing more will come
let gone = ""; // why we may not watch

const isOpen = () => socket?.readyState === WebSocket.OPEN;

function send(frame) {
  if (isOpen()) socket.send(JSON.stringify(frame));
}

function connect() {
  clearTimeout(retry);
  if (over) return;
  const url = new URL(part.dataset.socket, window.location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const opening = new WebSocket(url);
  socket = opening;
  opening.onopen = () => send({ type: "resume", offset: expected });
  opening.onmessage = (message) => {
    attempts = 0;
    const frame = JSON.parse(message.data);
    HEARD[frame.type]?.(frame);
  };
  opening.onclose = (close) => opening === socket && lost(close);
}

function forget() {
  if (size) ours = size.yours ? size : null;
  offering ||= Boolean(ours);
  socket = null;
  size = null;
  endAsking();
}

function lost({ code, reason }) {
  forget();
  if (code === SIGNED_OUT) return signIn();
  if (FINAL.has(code)) {
    over = true;
    gone = reason;
  }
  showStanding();
  if (over) return;
  const most = Math.min(LONGEST, 1000 * 2 ** attempts);
  attempts += 1;
  retry = setTimeout(connect, most * (0.3 + 0.7 * Math.random()));
}

function signIn() {
  const back = encodeURIComponent(window.location.pathname + window.location.search);
  window.location.assign(`${document.querySelector('meta[name="login"]').content}?next=${back}`);
}

function reconnect() {
  if (over) return;
  const old = socket;
  forget();
  old?.close();
  connect();
}

// ── how it stands ────────────────────────────────────────────────────────────────────────────────

const REACHABLE = new Set(["active", "recovering"]);
const SAID = 12_000; // ms a refusal stays
let session = null; // the hub's last word on it
let exitCode = null;
let painted = false;
let saying = null;

function takeState(frame) {
  const isNews = session && (session.activity !== frame.activity || session.reason !== frame.reason);
  if (isNews) htmx.trigger(document.body, "live-now");
  session = frame;
  offerSize();
  showStanding();
  if (isReachable()) say("");
  // there may be no picture to show: the last one the hub was sent is better than nothing
  else if (!painted && frame.status !== "starting" && !isEnded()) at("screen-part").open = true;
}

const isEnded = () => ["closed", "failed"].includes(session?.status);

function ended({ exit_code }) {
  over = true;
  exitCode = exit_code;
  showStanding();
}

function refused({ detail }) {
  endAsking();
  say(detail);
}

function connecting() {
  if (!attempts) return ["connecting", "connecting"];
  if (session || attempts < 4) return ["away", "reconnecting"];
  return ["away", "not connected: does a proxy refuse WebSockets? The log below works without them"];
}

function standing() {
  if (gone) return ["refused", gone];
  if (over && session?.status === "failed") return ["ended", "did not start"];
  if (over) return ["ended", exitCode === null ? "ended" : `ended with exit code ${exitCode}`];
  if (!isOpen() || !session) return connecting();
  const readOnly = session.may_type ? "" : ", read only";
  if (session.status === "starting") return ["connecting", `starting${readOnly}`];
  if (session.status === "lost") return ["away", `lost${session.reason ? `: ${session.reason}` : ""}`];
  if (!session.server_online) return ["away", `disconnected: ${session.server_name} is offline`];
  if (session.status === "disconnected" || !session.connected) return ["away", `disconnected from ${session.server_name}`];
  return ["live", `live${readOnly}`];
}

function showStanding() {
  const [state, words] = standing();
  part.dataset.state = state;
  if (at("terminal-words").textContent !== words) at("terminal-words").textContent = words;
  at("take-size").hidden = !isOpen() || !size || size.yours || !mayType() || !isReachable();
  at("show-scrollback").hidden = over;
  keys.show(mayType());
  if (!size) at("terminal-size").replaceChildren();
}

function say(text) {
  clearTimeout(saying);
  const place = at("terminal-said");
  if (place.textContent !== text) place.textContent = text;
  if (text) saying = setTimeout(say, SAID, "");
}

// ── scrollback ───────────────────────────────────────────────────────────────────────────────────

const scrollback = at("scrollback");
const history = at("scrollback-text");
let asking = false;

function askScrollback() {
  if (asking) return;
  if (!isOpen()) return say("The scrollback cannot be fetched: the hub cannot be reached now.");
  asking = true;
  at("show-scrollback").setAttribute("aria-busy", "true");
  send({ type: "scrollback" });
}

function endAsking() {
  asking = false;
  at("show-scrollback").removeAttribute("aria-busy");
}

function showScrollback({ lines }) {
  if (!asking) return;
  endAsking();
  history.textContent = lines.join("\n").trimEnd();
  const count = history.textContent ? history.textContent.split("\n").length : 0;
  at("scrollback-size").textContent = `${count.toLocaleString()} lines`;
  at("scrollback-copy").textContent = "Copy all";
  scrollback.showModal();
  history.scrollTop = history.scrollHeight;
  if (find.text()) findInLines.open(find.text()); // what was looked for may have scrolled away
}

async function copyScrollback(event) {
  const button = event.currentTarget;
  window.getSelection().selectAllChildren(history);
  try {
    await navigator.clipboard.writeText(history.textContent);
    button.textContent = "Copied";
  } catch {
    // no clipboard without TLS: the text is selected, the browser's own copy works
    button.textContent = "Press Ctrl+C";
  }
}

// ── the search and the keys ──────────────────────────────────────────────────────────────────────

const searching = new Search();
const find = findBar(at("find"), (tell) => inTerminal(term, searching, tell), () => term.focus());
const findInLines = findBar(at("scrollback-find"), (tell) => inText(history, tell), () => history.focus());
const keys = keyBar(at("terminal-keys"), term, askPaste);

const isFind = (event) => event.ctrlKey && event.shiftKey && !event.altKey && event.key.toLowerCase() === "f";

function findHere(event) {
  if (!isFind(event)) return;
  event.preventDefault();
  (scrollback.open ? findInLines : find).open();
}

// ── all together ─────────────────────────────────────────────────────────────────────────────────

term.loadAddon(new Unicode11Addon());
term.unicode.activeVersion = "11";
term.options.fontSize = ownFont();
takeNoOrders(term);
term.loadAddon(searching);
term.open(at("terminal"));
term.textarea.setAttribute("aria-label", "Terminal of the session");
term.textarea.setAttribute("aria-describedby", "terminal-help");
term.attachCustomKeyEventHandler(isForSession);
// A wheel turned over a program that does not ask for it scrolls the page, instead of typing.
term.attachCustomWheelEventHandler(
  () => term.buffer.active.type === "normal" || term.modes.mouseTrackingMode !== "none",
);
term.onData((data) => {
  const held = keys.hold(data);
  typed(held, () => new TextEncoder().encode(held));
});
term.onBinary((data) => typed(data, () => Uint8Array.from(data, (char) => char.charCodeAt(0))));
box.addEventListener("paste", paste, true);

at("take-size").addEventListener("click", () => send({ type: "take_size", ...fit() }));
at("show-scrollback").addEventListener("click", askScrollback);
at("show-find").addEventListener("click", () => find.open());
at("scrollback-show-find").addEventListener("click", () => findInLines.open());
scrollback.addEventListener("close", () => findInLines.close());
document.addEventListener("keydown", findHere);
at("paste").addEventListener("close", takePaste);
at("scrollback-copy").addEventListener("click", copyScrollback);
at("terminal-reader").checked = term.options.screenReaderMode;
at("terminal-reader").addEventListener("change", ({ target }) => {
  term.options.screenReaderMode = target.checked;
  localStorage.setItem("terminal-reader", target.checked ? "on" : "off");
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  term.options.theme = theme();
});
window.addEventListener("resize", () => {
  clearTimeout(settling);
  settling = setTimeout(windowChanged, SETTLE);
});
document.addEventListener("visibilitychange", () => !document.hidden && !socket && reconnect());
window.addEventListener("online", reconnect);
window.addEventListener("pagehide", () => {
  over = true;
  socket?.close();
});

connect();
