// The keyboard: g and a letter leads to a page, j and k walk the rows of its list, and so on; the
// dialog behind ? lists them (templates/_keys.html). Where a key leads to stands in the page.
//
// The cursor is the focus itself, on the link of the row, so that Enter opens it, a screen reader
// reads it and a live update leaves it where it is.
"use strict";

(() => {
  const TYPING =
    "input:not([type=checkbox], [type=radio], [type=submit], [type=button]), textarea, select, " +
    "[contenteditable], .xterm, #swagger";
  const ROWS = "table.list tbody tr, .rows > li, .waits article, .cards > li, .task-card";
  const SEQUENCE = 1500; // ms between g and its letter
  let begun = -SEQUENCE; // when g was pressed
  let cursor = { id: null, index: -1 };

  const isShown = (element) => element.checkVisibility({ visibilityProperty: true });

  function rows() {
    return [...document.querySelectorAll(`main :is(${ROWS})`)].filter(isShown);
  }

  // Where in the list we are: on the focused row, else on the last one or what took its place.
  function place(all) {
    const focused = all.findIndex((row) => row.contains(document.activeElement));
    if (focused >= 0) return focused;
    const known = all.findIndex((row) => row.id && row.id === cursor.id);
    if (known >= 0) return known;
    return cursor.index < 0 ? -1 : Math.min(cursor.index, all.length) - 0.5;
  }

  function walk(step) {
    const all = rows();
    if (!all.length) return;
    const here = place(all);
    const next = step > 0 ? Math.floor(here) + 1 : Math.ceil(here) - 1;
    const index = here === -1 ? 0 : Math.max(0, Math.min(all.length - 1, next));
    cursor = { id: all[index].id, index };
    focusRow(all[index]);
  }

  function focusRow(row) {
    const target = row.matches("article") ? row : row.querySelector("a.title, a[href]") || row;
    if (target === row) row.tabIndex = -1;
    target.focus({ preventScroll: true, focusVisible: true });
    row.scrollIntoView({ block: "nearest" });
  }

  function open() {
    const row = document.activeElement;
    if (row.matches(`main :is(${ROWS})`)) row.querySelector("a.title, a[href]")?.click();
  }

  function search() {
    const field = [...document.querySelectorAll("main input[type=search]")].find(isShown);
    if (!field) return press("[data-palette]");
    field.focus();
    field.select();
  }

  function press(selector) {
    document.querySelector(selector)?.click();
  }

  function visit(link) {
    if (link) window.location.assign(link.href || link.dataset.href);
  }

  // ── the inbox: a key decides only on the item that has the focus and is on the screen ──

  function isOnScreen(element) {
    const { top, bottom } = element.getBoundingClientRect();
    return top >= 0 && bottom <= window.innerHeight;
  }

  function ownItem(part) {
    return document.activeElement.closest(".waits article")?.querySelector(part);
  }

  function approve() {
    const button = ownItem("[data-key=a]");
    if (!button) return;
    if (isOnScreen(button)) return button.click();
    button.focus({ focusVisible: true }); // first it is shown what would be done
    button.scrollIntoView({ block: "center" });
  }

  function answer() {
    const field = ownItem("[data-key=r]");
    field?.focus();
    field?.scrollIntoView({ block: "nearest" });
  }

  const KEYS = {
    j: () => walk(1),
    k: () => walk(-1),
    c: () => visit(document.querySelector("#palette [data-key=c]")),
    a: approve,
    r: answer,
    "/": search,
    "?": () => press("[data-open=keys]"),
  };

  function go(key) {
    begun = -SEQUENCE;
    visit(document.querySelector(`[data-go="${CSS.escape(key)}"]`));
  }

  function isTaken(event) {
    if (event.defaultPrevented || event.isComposing) return true;
    return event.target.closest(TYPING) || document.querySelector("dialog[open]");
  }

  // An entry of the bar that gets the focus is moved into its visible part.
  document.querySelector("nav").addEventListener("focusin", ({ target }) => {
    target.scrollIntoView({ block: "nearest", inline: "nearest" });
  });

  document.addEventListener("keydown", (event) => {
    if (isTaken(event)) return;
    const { key, ctrlKey, metaKey, altKey } = event;
    if ((ctrlKey || metaKey) && !altKey && !event.shiftKey && key.toLowerCase() === "k") {
      event.preventDefault();
      return press("[data-palette]");
    }
    if (ctrlKey || metaKey || altKey) return;
    if (key === "Enter") return open();
    if (event.timeStamp - begun < SEQUENCE) return go(key);
    if (key === "g" && !event.repeat) begun = event.timeStamp;
    if (!Object.hasOwn(KEYS, key) || (event.repeat && !"jk".includes(key))) return;
    event.preventDefault(); // what the key opens does not get the letter
    KEYS[key]();
  });
})();
