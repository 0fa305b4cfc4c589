// What every page needs: local times, copy buttons, dialogs, filters that apply by themselves,
// and refusals shown beside the form they belong to.
"use strict";

(() => {
  const TODAY = { hour: "2-digit", minute: "2-digit", second: "2-digit" };
  const BEFORE = { ...TODAY, year: "numeric", month: "short", day: "numeric", second: undefined };

  function localise(root) {
    const today = new Date().toDateString();
    for (const time of root.querySelectorAll("time[datetime]")) {
      const at = new Date(time.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      const text = at.toLocaleString(undefined, at.toDateString() === today ? TODAY : BEFORE);
      if (time.textContent !== text) time.textContent = text;
      time.title = at.toLocaleString(undefined, { dateStyle: "full", timeStyle: "long" });
    }
  }

  // The live parts of a page change in place: what a person opened stays open, what they were
  // told stays there.
  Idiomorph.defaults.ignoreActiveValue = true;
  Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, element) =>
    !(name === "open" && element.matches("details, dialog")) &&
    !(name === "tabindex" && element === document.activeElement); // the cursor stays (keys.js)
  Idiomorph.defaults.callbacks.beforeNodeMorphed = (old) =>
    !(old instanceof Element && (old.matches(".notice:not(:empty)") || isBegun(old)));

  // A field that somebody has begun to fill in.
  function isBegun(field) {
    if (field.matches("select")) {
      const standing = [...field.options].findIndex((option) => option.defaultSelected);
      return field.selectedIndex !== Math.max(standing, 0);
    }
    if (field.matches("input[type=checkbox]")) return field.checked !== field.defaultChecked;
    return field.matches("textarea, input:not([type=hidden])") && field.value !== field.defaultValue;
  }

  // What was done is not done again by mistake.
  document.addEventListener("htmx:afterRequest", ({ detail }) => {
    const form = detail.elt.closest("form[data-reset]");
    if (form && detail.xhr.status < 300 && detail.requestConfig.verb !== "get") form.reset();
  });

  // The tab says how much waits.
  const title = document.title;
  function tellTitle() {
    const count = Number(document.getElementById("waiting-count")?.dataset.count);
    document.title = count ? `(${count}) ${title}` : title;
  }

  async function copy(button) {
    const field = document.getElementById(button.dataset.copy);
    field.select();
    try {
      await navigator.clipboard.writeText(field.value);
      button.textContent = "Copied";
    } catch {
      // no clipboard without TLS: the text is selected, the browser's own copy works
      button.textContent = "Press Ctrl+C";
    }
  }

  const fresh = new WeakMap(); // dialog: as it was before it was opened

  function showDialog(id) {
    const dialog = document.getElementById(id);
    if (!(dialog instanceof HTMLDialogElement)) return false;
    if (dialog.open) return true;
    fresh.set(dialog, dialog.cloneNode(true));
    dialog.showModal();
    return true;
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy], [data-open], [data-close]");
    if (!button) return;
    if (button.dataset.copy) copy(button);
    else if (button.dataset.open) showDialog(button.dataset.open);
    else button.closest("dialog").close();
  });

  // A dialog begins anew each time: what it showed once (a token) is gone when it is closed.
  document.addEventListener(
    "close",
    (event) => {
      const again = fresh.get(event.target);
      if (!again) return;
      event.target.replaceWith(again);
      htmx.process(again);
    },
    true,
  );

  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
  });

  // Empty fields stay out of the address.
  document.addEventListener("submit", (event) => {
    if (event.target.method !== "get") return;
    for (const field of event.target.elements) if (!field.value) field.disabled = true;
  });

  function noticeFor({ verb, elt }) {
    const near = verb === "get" ? null : elt.querySelector(".notice");
    return near || document.getElementById("notice");
  }

  // A refusal is swapped into the nearest place for it, never over what was asked for.
  document.addEventListener("htmx:beforeSwap", (event) => {
    const { xhr, requestConfig } = event.detail;
    if (xhr.status < 400) return;
    if (!xhr.responseText.includes('class="refusal"')) return tellNoAnswer(event); // a proxy's page
    event.detail.target = noticeFor(requestConfig);
    event.detail.swapOverride = "innerHTML";
    event.detail.shouldSwap = true;
    event.detail.isError = false;
  });

  document.addEventListener("htmx:beforeRequest", (event) => {
    const { requestConfig } = event.detail;
    noticeFor(requestConfig).replaceChildren();
  });

  // A deed that takes long says so (keys.css shows it after a while).
  let underWay = 0;
  function tellBusy(change) {
    underWay = Math.max(0, underWay + change);
    const text = underWay ? "The hub is at it…" : "";
    const place = document.getElementById("busy");
    if (place.textContent !== text) place.textContent = text;
  }
  for (const [name, change] of [["htmx:beforeSend", 1], ["htmx:afterRequest", -1]]) {
    document.addEventListener(name, ({ detail }) => {
      if (detail.requestConfig.verb !== "get") tellBusy(change);
    });
  }

  // What is only read is read again when the hub is back (live.js).
  function tellNoAnswer({ detail: { requestConfig } }) {
    if (requestConfig.verb === "get") return;
    noticeFor(requestConfig).textContent = "The hub did not answer: nothing is known to have changed. Try again.";
  }
  document.addEventListener("htmx:sendError", tellNoAnswer);

  document.addEventListener("htmx:afterSwap", () => {
    localise(document);
    tellTitle();
  });
  localise(document);
  tellTitle();
  for (const field of document.querySelectorAll("[data-own-zone]")) {
    field.value ||= Intl.DateTimeFormat().resolvedOptions().timeZone;
  }
  document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
  function openByHash() {
    if (!window.location.hash || !showDialog(window.location.hash.slice(1))) return;
    window.history.replaceState(null, "", window.location.pathname + window.location.search);
  }
  window.addEventListener("hashchange", openByHash);
  openByHash();
})();
