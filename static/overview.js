// Marks what has finished since this browser last showed the overview to somebody.
"use strict";

(() => {
  const NAME = "orchestratia:looked";
  let looked = null;
  try {
    looked = window.localStorage.getItem(NAME);
  } catch {
    return; // a browser that keeps nothing marks nothing
  }

  function mark() {
    let fresh = 0;
    for (const row of document.querySelectorAll("[data-ended]")) {
      const isNew = looked !== null && row.dataset.ended > looked;
      row.classList.toggle("is-new", isNew);
      fresh += isNew;
    }
    const words = document.getElementById("finished-new");
    if (words) words.textContent = fresh ? `${fresh} since you last looked` : "";
  }

  function remember() {
    window.localStorage.setItem(NAME, new Date().toISOString());
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) remember();
    else {
      looked = window.localStorage.getItem(NAME);
      mark();
    }
  });
  window.addEventListener("pagehide", remember);
  document.addEventListener("htmx:afterSwap", mark);
  mark();
})();
