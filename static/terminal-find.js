// A bar that finds a text: in the terminal, and in the lines of the scrollback.
import { SearchAddon } from "./vendor/addon-search.mjs";

const COLOURS = {
  matchBackground: "#6b5a1e", matchOverviewRuler: "#e0b35c",
  activeMatchBackground: "#f2b950", activeMatchColorOverviewRuler: "#f2b950",
};
const MOST = 5000; // matches in the scrollback

// The add-on remembers the lines it has read until a line feed; a program that draws the screen anew
// may do without one, so here they are forgotten whenever something was written. And where the first
// line says that it goes on from one before it, which is gone, the add-on would look for that, and
// read on behind the last one.
export class Search extends SearchAddon {
  activate(term) {
    const active = () => Object.create(term.buffer.active, { getLine: { value: line } });
    function line(y) {
      if (y < 0 || y >= term.buffer.active.length) return undefined;
      const found = term.buffer.active.getLine(y);
      return y === 0 ? Object.create(found, { isWrapped: { value: false } }) : found;
    }
    super.activate(Object.create(term, {
      onLineFeed: { value: term.onWriteParsed },
      buffer: { value: Object.defineProperty({}, "active", { get: active }) },
    }));
  }
}

// What is found in a terminal, by its add-on: {seek(text, step), clear()}; tell(index, count).
// The add-on goes on from what is selected; a resize takes the selection away and leaves the lines.
export function inTerminal(term, addon, tell) {
  let found = null; // [column, line, length] of the match one is at
  let wanted = "";
  let gone = false; // the screen was empty for a moment, as it is while it is drawn anew
  const options = (incremental) => ({ decorations: COLOURS, incremental });

  function forget() {
    found = null;
    gone = false;
  }

  function backToPlace() {
    gone = false;
    term.select(...found);
    addon.findPrevious(wanted, options(true), { noScroll: true });
  }

  addon.onDidChangeResults(({ resultIndex, resultCount }) => {
    const place = term.getSelectionPosition();
    if (place && gone && resultCount) return backToPlace();
    gone = Boolean(found) && !place;
    if (place) found = [place.start.x, place.start.y, (place.end.y - place.start.y) * term.cols + place.end.x - place.start.x];
    tell(resultIndex, resultCount);
  });
  term.onResize(() => {
    if (found && term.hasSelection()) queueMicrotask(() => term.select(...found)); // once it is taken
  });
  return {
    seek(text, step) {
      if (text !== wanted) forget();
      wanted = text;
      if (step < 0) addon.findPrevious(text, options(false));
      else addon.findNext(text, options(step === 0));
    },
    clear() {
      forget();
      addon.clearDecorations();
      term.clearSelection(); // with it Ctrl+C would copy, not interrupt
    },
  };
}

// What is found in a `pre` that holds one text.
export function inText(pre, tell) {
  let text = null;
  let ranges = [];
  let current = -1;

  function look() {
    const node = pre.firstChild;
    const pattern = new RegExp(text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "giu");
    ranges = [];
    if (node) {
      for (const match of node.data.matchAll(pattern)) {
        if (ranges.length === MOST) break;
        const range = new StaticRange({
          startContainer: node, startOffset: match.index,
          endContainer: node, endOffset: match.index + match[0].length,
        });
        ranges.push(range);
      }
    }
    current = -1;
  }

  function paint() {
    if (!window.CSS.highlights) return; // an older browser scrolls there all the same
    CSS.highlights.set("found", new Highlight(...ranges));
    CSS.highlights.set("found-now", new Highlight(...ranges.slice(current, current + 1)));
    CSS.highlights.get("found-now").priority = 1;
  }

  function show() {
    const range = document.createRange();
    const { startContainer, startOffset, endContainer, endOffset } = ranges[current];
    range.setStart(startContainer, startOffset);
    range.setEnd(endContainer, endOffset);
    const [box, frame] = [range.getBoundingClientRect(), pre.getBoundingClientRect()];
    if (box.top < frame.top || box.bottom > frame.bottom) {
      pre.scrollTop += box.top - frame.top - frame.height / 2;
    }
  }

  return {
    seek(wanted, step) {
      if (wanted !== text) {
        text = wanted;
        look();
        step ||= -1; // the newest first
      }
      const from = current < 0 && step < 0 ? 0 : current;
      current = ranges.length ? (from + step + ranges.length) % ranges.length : -1;
      paint();
      if (current >= 0) show();
      tell(current, ranges.length);
    },
    clear() {
      text = null;
      window.CSS.highlights?.delete("found");
      window.CSS.highlights?.delete("found-now");
    },
  };
}

// place: (tell) => one of the above; leave: what has the focus after the bar.
export function findBar(bar, place, leave) {
  const field = bar.querySelector("input");
  const count = bar.querySelector("output");
  const searcher = place(tell);

  function tell(index, found) {
    if (!field.value) return;
    bar.dataset.found = found ? "some" : "none";
    if (!found) count.value = "not found";
    else count.value = index < 0 ? `${found.toLocaleString()} found` : `${index + 1} of ${found.toLocaleString()}`;
  }

  function seek(step) {
    if (field.value) return searcher.seek(field.value, step);
    searcher.clear();
    count.value = "";
    delete bar.dataset.found;
  }

  function open(text) {
    bar.hidden = false;
    if (text) field.value = text;
    field.focus();
    field.select();
    seek(0);
  }

  function close() {
    if (bar.hidden) return;
    bar.hidden = true;
    searcher.clear();
    leave();
  }

  field.addEventListener("input", () => seek(0));
  bar.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.preventDefault(); // of a dialog around it: that stays open
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && event.target === field) {
      event.preventDefault();
      seek(event.shiftKey ? -1 : 1);
    }
  });
  bar.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button?.dataset.step) seek(Number(button.dataset.step));
    else if (button) close();
  });
  return { open, close, text: () => (bar.hidden ? "" : field.value) };
}
