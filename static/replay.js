// The replay of a session: the recording played back, and its events to jump to.
//
// Events are placed by their time since the recording began. Long silence is shortened before the
// player gets the recording, so that both ways of counting are known exactly here.
"use strict";

(() => {
  const SILENCE = 2000; // ms that are left of a longer silence
  const LOOK = 200; // ms between two looks at the player
  const CLOCK = { hour: "2-digit", minute: "2-digit", second: "2-digit" };
  const HEIGHT = 0.66; // of the window, at most
  const LEAST_COLUMN = 5.5; // px; a wider recording is scrolled sideways

  const at = (id) => document.getElementById(id);
  const part = at("replay");
  const place = at("player");
  const seek = at("seek");
  const speed = at("speed");
  const skip = at("skip");
  const jumps = [...document.querySelectorAll("button.jump")];
  let recording = null; // {cols, rows, events: [[ms, kind, data], …]} in its own time
  let line = null; // how its own time and the player's go together
  let player = null;
  let playing = false;
  let generation = 0; // of the player: what an earlier one says is no concern

  // ── the recording ──

  function readEvent(text) {
    const [seconds, kind, data] = JSON.parse(text);
    if (kind !== "r") return [seconds * 1000, kind, data];
    const [cols, rows] = data.split("x").map(Number);
    return [seconds * 1000, kind, { cols, rows }];
  }

  function parse(text) {
    const lines = text.split("\n").filter(Boolean);
    const { width, height } = JSON.parse(lines[0]);
    const events = lines.slice(1).map(readEvent);
    if (!events.some(([, kind]) => kind === "o")) throw new Error("nothing was printed");
    return { cols: width, rows: height, events };
  }

  // Places in both times, in order, and straight between them.
  function lineOf(events, most) {
    const real = [0];
    const played = [0];
    for (const [time] of events) {
      const gap = time - real.at(-1);
      played.push(played.at(-1) + Math.min(gap, most));
      real.push(time);
    }
    return { real, played };
  }

  function between(value, from, to) {
    let [low, high] = [0, from.length - 1];
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (from[middle] <= value) low = middle;
      else high = middle - 1;
    }
    if (low === from.length - 1) return to[low];
    const part = (value - from[low]) / (from[low + 1] - from[low]);
    return to[low] + part * (to[low + 1] - to[low]);
  }

  const toPlayed = (ms) => between(ms, line.real, line.played);
  const toReal = (ms) => between(ms, line.played, line.real);
  const whole = () => line.played.at(-1);

  // ── the player ──

  function makeRoom() {
    const { cols, rows } = recording;
    place.style.minWidth = `${Math.ceil(cols * LEAST_COLUMN)}px`;
    const wanted = (place.clientWidth * rows * 2.25) / cols;
    place.style.height = `${Math.min(wanted, window.innerHeight * HEIGHT)}px`;
  }

  // Speed and silence are what a player is made with: another one takes over where it stood.
  async function build(realMs, play) {
    const mine = ++generation;
    player?.dispose();
    line = lineOf(recording.events, skip.checked ? SILENCE : Infinity);
    const events = recording.events.map(([, kind, data], n) => [line.played[n + 1], kind, data]);
    makeRoom();
    player = AsciinemaPlayer.create({ data: { ...recording, events }, parser: (data) => data }, place, {
      controls: false,
      fit: "both",
      poster: "npt:0",
      preload: true,
      speed: Number(speed.value),
      terminalFontFamily: getComputedStyle(document.documentElement).getPropertyValue("--mono"),
      theme: "house",
    });
    const told = (state) => () => mine === generation && setPlaying(state);
    player.addEventListener("playing", told(true));
    player.addEventListener("pause", told(false));
    player.addEventListener("ended", told(false));
    showWhole();
    if (realMs > 0) await player.seek(toPlayed(realMs) / 1000);
    if (play && mine === generation) await player.play();
    showTime();
  }

  const now = () => Math.min(player.getCurrentTime() * 1000, whole());

  async function jumpTo(realMs) {
    await player.seek(toPlayed(realMs) / 1000);
    showTime();
  }

  async function toggle() {
    if (playing) return player.pause();
    if (now() >= whole() - 1) await player.seek(0);
    return player.play();
  }

  // ── what is shown ──

  function minutes(ms) {
    const seconds = Math.floor(ms / 1000);
    const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
    const two = (n) => String(n).padStart(2, "0");
    return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
  }

  function write(id, text) {
    if (at(id).textContent !== text) at(id).textContent = text;
  }

  function setPlaying(state) {
    playing = state;
    at("play").querySelector("use").setAttribute("href", state ? "#s-bars" : "#s-play");
    at("play").querySelector("span").textContent = state ? "Pause" : "Play";
    part.dataset.state = state ? "playing" : "paused";
    showTime();
  }

  function showTime() {
    const time = now();
    const real = toReal(time);
    if (!part.dataset.drag) seek.value = time / 1000;
    seek.setAttribute("aria-valuetext", `${minutes(time)} of ${minutes(whole())}`);
    write("time", minutes(time));
    const clock = new Date(Number(part.dataset.began) * 1000 + real);
    write("clock", clock.toLocaleTimeString(undefined, CLOCK));
    markJump(time >= whole() - 1 ? Infinity : real);
  }

  // The last event before what is shown.
  function markJump(real) {
    const passed = jumps.filter((jump) => jump.dataset.offset * 1000 <= real + 1);
    for (const jump of jumps) {
      if (jump === passed.at(-1)) jump.setAttribute("aria-current", "true");
      else jump.removeAttribute("aria-current");
    }
  }

  function showWhole() {
    const step = whole() > 60_000 ? 1000 : 100;
    seek.step = step / 1000;
    seek.max = (Math.ceil(whole() / step) * step) / 1000; // its last step is the very end
    write("whole", minutes(whole()));
    const ticks = jumps.map((jump) => [jump.dataset.offset * 1000, ""]);
    const gaps = recording.events.filter(([, kind]) => kind === "m").map(([time]) => [time, "gap"]);
    at("ticks").replaceChildren(...[...ticks, ...gaps].map(([time, kind]) => tick(time, kind)));
    for (const jump of jumps) {
      const text = minutes(toPlayed(jump.dataset.offset * 1000));
      jump.closest("li").querySelector(".at").textContent = text;
    }
  }

  function tick(time, kind) {
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const x = whole() ? (998 * toPlayed(time)) / whole() : 0;
    for (const [name, value] of Object.entries({ x, y: 0, width: 2, height: 10, class: kind })) {
      mark.setAttribute(name, value);
    }
    return mark;
  }

  // ── all together ──

  function fields(usable) {
    for (const field of [seek, speed, skip, at("play"), ...jumps]) field.disabled = !usable;
  }

  async function load() {
    at("replay-again").hidden = true;
    part.dataset.state = "loading";
    try {
      const answer = await fetch(part.dataset.recording);
      if (!answer.ok) throw new Error((await answer.json()).detail);
      recording = parse(await answer.text());
      await build(0, false);
      fields(true);
      setPlaying(false);
      write("replay-words", "");
    } catch (error) {
      part.dataset.state = "failed";
      write("replay-words", `The recording could not be loaded: ${error.message}`);
      at("replay-again").hidden = false;
    }
  }

  at("play").addEventListener("click", toggle);
  at("replay-again").addEventListener("click", load);
  for (const field of [speed, skip]) {
    field.addEventListener("change", () => build(toReal(now()), playing));
  }
  seek.addEventListener("input", () => player.seek(Math.min(seek.value, whole() / 1000)).then(showTime));
  seek.addEventListener("pointerdown", () => { part.dataset.drag = "yes"; });
  for (const end of ["pointerup", "pointercancel"]) {
    seek.addEventListener(end, () => { delete part.dataset.drag; });
  }
  for (const jump of jumps) {
    jump.addEventListener("click", () => jumpTo(jump.dataset.offset * 1000));
  }
  setInterval(() => playing && showTime(), LOOK);
  load();
})();
