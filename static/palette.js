// The palette: what is typed is looked for among the pages and actions that stand in the dialog and
// among what the hub finds. The field keeps the focus; arrows move the choice, Enter takes it.
"use strict";

(() => {
  const PAUSE = 120; // ms of rest before the hub is asked
  const dialog = document.getElementById("palette");
  const field = document.getElementById("palette-field");
  const list = document.getElementById("palette-list");
  const said = document.getElementById("palette-said");
  const own = [...list.children]; // pages and actions
  let found = []; // what the hub answered last
  let asking = null;
  let timer = null;

  // 3 at its start, 2 at the start of a word, 1 for letters in their order, 0 not at all.
  function rank(typed, name) {
    if (name.startsWith(typed)) return 3;
    if (name.split(" ").some((word) => word.startsWith(typed))) return 2;
    let at = -1;
    return [...typed].every((letter) => (at = name.indexOf(letter, at + 1)) >= 0) ? 1 : 0;
  }

  function fitting(typed) {
    if (!typed) return own;
    const ranked = own.map((option) => [rank(typed, option.dataset.name.toLowerCase()), option]);
    return ranked.filter(([fits]) => fits).sort(([a], [b]) => b - a).map(([, option]) => option);
  }

  function show() {
    const typed = field.value.trim().toLowerCase();
    const before = chosen()?.id;
    const fits = fitting(typed);
    const strong = typed ? fits.filter((o) => rank(typed, o.dataset.name.toLowerCase()) > 1) : fits;
    const weak = fits.filter((option) => !strong.includes(option));
    list.replaceChildren(...strong, ...(typed ? found : []), ...weak);
    const options = [...list.children];
    choose(options.find((option) => option.id === before && touched) || options[0]);
  }

  let touched = false; // the person moved the choice: answers leave it where it is

  function chosen() {
    return list.querySelector("[aria-selected=true]");
  }

  function choose(option) {
    chosen()?.removeAttribute("aria-selected");
    field.removeAttribute("aria-activedescendant");
    if (!option) return;
    option.setAttribute("aria-selected", "true");
    field.setAttribute("aria-activedescendant", option.id);
    option.scrollIntoView({ block: "nearest" });
  }

  function move(step) {
    const options = [...list.children];
    if (!options.length) return;
    touched = true;
    const at = options.indexOf(chosen()) + step;
    choose(options[(at + options.length) % options.length]);
  }

  function take(option) {
    if (!option) return;
    const { href, press } = option.dataset;
    dialog.close();
    if (href) window.location.assign(href);
    else document.querySelector(press).click();
  }

  async function ask() {
    asking?.abort();
    asking = new AbortController();
    const { signal } = asking;
    const address = new URL(dialog.dataset.find, window.location.href);
    address.searchParams.set("q", field.value.trim());
    try {
      const answer = await fetch(address, { signal, headers: { "HX-Request": "true" } });
      if (answer.status !== 200) throw new Error(`the hub answered ${answer.status}`);
      const holder = document.createElement("template");
      holder.innerHTML = await answer.text();
      if (signal.aborted) return;
      found = [...holder.content.children];
      show();
      tell(`${list.children.length} fit`);
    } catch (error) {
      if (!signal.aborted) tell("The hub did not answer: only pages and actions are shown.");
    }
  }

  function tell(text) {
    said.textContent = text;
  }

  function hear() {
    touched = false;
    clearTimeout(timer);
    asking?.abort();
    if (field.value.trim()) timer = setTimeout(ask, PAUSE);
    else found = [];
    tell(field.value.trim() ? "" : "Pages and actions. Type to find tasks, sessions, servers and pipelines too.");
    show();
  }

  const KEYS = {
    ArrowDown: () => move(1),
    ArrowUp: () => move(-1),
    Enter: () => take(chosen()),
  };

  field.addEventListener("input", hear);
  dialog.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    const isOwn = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k";
    if (!isOwn && !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    if (isOwn) dialog.close();
    else KEYS[event.key]();
  });
  list.addEventListener("click", (event) => take(event.target.closest("[role=option]")));
  list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.addEventListener("click", (event) => {
    if (!event.target.closest("[data-palette]")) return;
    field.value = "";
    hear();
    dialog.showModal();
    field.focus();
  });
})();
