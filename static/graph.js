// The picture of a graph: zoom, drag, and boxes that change while they are looked at.
//
// The picture scrolls in its frame and is zoomed by its size, so keys, wheel and finger work as
// everywhere. What an event touches is asked for once per PAUSE, however many events come.
"use strict";

(() => {
  const PAUSE = 120;
  const LEAST = 0.1;
  const MOST = 3;
  const STEP = 1.25;
  const MOVED = 4; // pixels after which a press is a drag and no click
  let zoom = null; // as chosen; null: as it comes
  let touched = new Set();
  let timer = null;

  const frame = () => document.querySelector(".graph");
  const picture = () => frame()?.querySelector(":scope > svg");

  function size() {
    const { width, height } = picture().viewBox.baseVal;
    return { width, height };
  }

  function apply(next, about) {
    const box = frame();
    const svg = picture();
    const { width, height } = size();
    const before = svg.width.baseVal.value / width;
    zoom = Math.min(MOST, Math.max(LEAST, next));
    const at = about || { x: box.clientWidth / 2, y: box.clientHeight / 2 };
    const left = ((box.scrollLeft + at.x) / before) * zoom - at.x;
    const top = ((box.scrollTop + at.y) / before) * zoom - at.y;
    svg.setAttribute("width", width * zoom);
    svg.setAttribute("height", height * zoom);
    box.scrollTo(left, top);
  }

  function fit() {
    const box = frame();
    const { width, height } = size();
    const room = Math.min((box.clientWidth - 24) / width, (window.innerHeight * 0.7) / height);
    apply(Math.min(1, room));
    box.scrollTo(0, 0);
  }

  const current = () => picture().width.baseVal.value / size().width;

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-zoom]");
    if (!button) return;
    if (button.dataset.zoom === "fit") fit();
    else apply(current() * (button.dataset.zoom === "in" ? STEP : 1 / STEP));
  });

  function keys(event) {
    if (event.target !== frame() || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "+" || event.key === "=") apply(current() * STEP);
    else if (event.key === "-") apply(current() / STEP);
    else if (event.key === "0") fit();
    else return;
    event.preventDefault();
  }

  function wheel(event) {
    if (!event.ctrlKey) return; // a pinch on a touchpad says Ctrl too
    event.preventDefault();
    const box = frame().getBoundingClientRect();
    apply(current() * Math.exp(-event.deltaY / 200), { x: event.clientX - box.x, y: event.clientY - box.y });
  }

  const pointers = new Map();
  let drag = null;

  function spread() {
    const [a, b] = [...pointers.values()];
    return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
  }

  function press(event) {
    pointers.set(event.pointerId, event);
    const box = frame();
    if (pointers.size === 2) drag = { apart: spread(), zoom: current() };
    else if (event.pointerType === "mouse" && event.button === 0) {
      drag = { x: event.clientX, y: event.clientY, left: box.scrollLeft, top: box.scrollTop, moved: false };
    }
  }

  function move(event) {
    if (!pointers.has(event.pointerId) || !drag) return;
    pointers.set(event.pointerId, event);
    if (drag.apart) {
      if (pointers.size !== 2) return;
      const box = frame().getBoundingClientRect();
      const [a, b] = [...pointers.values()];
      const about = { x: (a.clientX + b.clientX) / 2 - box.x, y: (a.clientY + b.clientY) / 2 - box.y };
      apply((drag.zoom * spread()) / drag.apart, about);
      return;
    }
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    drag.moved ||= Math.hypot(dx, dy) > MOVED;
    if (drag.moved) frame().scrollTo(drag.left - dx, drag.top - dy);
  }

  function release(event) {
    pointers.delete(event.pointerId);
    if (drag?.moved) {
      // the click that follows opens nothing
      const stop = (click) => click.preventDefault();
      frame().addEventListener("click", stop, { capture: true, once: true });
      setTimeout(() => frame()?.removeEventListener("click", stop, true));
    }
    if (!pointers.size || drag?.apart) drag = null;
  }

  // ── as it happens ──

  function paint(id, seen) {
    const node = document.getElementById(`node-${id}`);
    if (!node) return;
    node.dataset.state = seen.state;
    node.querySelector("title").textContent =
      `${node.querySelector("title").textContent.replace(/: [^:]*$/, "")}: ${seen.words}`;
    const box = node.querySelector("svg");
    box.setAttribute("class", `node tone-${seen.tone}`);
    box.querySelector("use").setAttribute("href", `#s-${seen.shape}`);
    box.querySelector(".node-state").textContent = seen.words;
    box.querySelector(".node-where").textContent = seen.where;
    for (const edge of document.querySelectorAll(`.edge[data-from="${id}"]`)) {
      edge.classList.toggle("edge-resolved", seen.state === "done");
    }
  }

  async function look() {
    timer = null;
    const ids = [...touched];
    touched = new Set();
    try {
      const answer = await fetch(`${frame().dataset.states}?ids=${ids.join(",")}`);
      if (!answer.ok) return;
      const { tasks } = await answer.json();
      for (const [id, seen] of Object.entries(tasks)) paint(id, seen);
    } catch {
      for (const id of ids) touched.add(id); // the stream says when the hub is back
    }
  }

  function touch(ids) {
    for (const id of ids) if (id && document.getElementById(`node-${id}`)) touched.add(id);
    if (touched.size && timer === null) timer = setTimeout(look, PAUSE);
  }

  document.body.addEventListener("orchestratia:event", ({ detail }) => {
    if (frame()?.dataset.states) touch([detail.task_id, detail.cause_task_id]);
  });
  document.body.addEventListener("orchestratia:gap", () => {
    if (frame()?.dataset.states) touch([...frame().querySelectorAll("[data-task]")].map((node) => node.dataset.task));
  });

  const ready = new WeakSet();

  function begin() {
    const box = frame();
    if (!box || !picture()) return;
    for (const tools of document.querySelectorAll(".graph-tools")) tools.hidden = false;
    if (!ready.has(box)) {
      ready.add(box);
      box.addEventListener("keydown", keys);
      box.addEventListener("wheel", wheel, { passive: false });
      box.addEventListener("pointerdown", press);
      box.addEventListener("dragstart", (event) => event.preventDefault());
      if (zoom === null && box.clientWidth < size().width && size().width < 2.2 * box.clientWidth) fit();
    }
    if (zoom !== null && current() !== zoom) apply(zoom, { x: 0, y: 0 });
  }

  window.addEventListener("pointermove", move);
  window.addEventListener("pointerup", release);
  window.addEventListener("pointercancel", release);
  document.addEventListener("htmx:afterSwap", begin);
  begin();
})();
