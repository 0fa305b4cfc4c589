// Picking several tasks, and forms whose rows can be added and dropped.
"use strict";

(() => {
  const several = document.getElementById("several");

  function tellPicked() {
    const picks = [...several.querySelectorAll("[data-pick]")];
    const count = picks.filter((pick) => pick.checked).length;
    several.classList.toggle("picked", count > 0);
    const words = document.getElementById("several-count");
    if (words) words.textContent = count ? `${count} picked` : "";
    const all = several.querySelector("[data-pick-all]");
    if (!all) return;
    all.checked = count > 0 && count === picks.length;
    all.indeterminate = count > 0 && count < picks.length;
  }

  if (several) {
    several.addEventListener("change", (event) => {
      if (event.target.matches("[data-pick-all]")) {
        for (const pick of several.querySelectorAll("[data-pick]")) pick.checked = event.target.checked;
      }
      tellPicked();
    });
    several.addEventListener("reset", () => setTimeout(tellPicked));
    document.addEventListener("htmx:afterSwap", tellPicked);
    tellPicked();
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-add], [data-drop]");
    if (!button) return;
    if (button.dataset.add) {
      const list = document.getElementById(button.dataset.to);
      list.append(document.getElementById(button.dataset.add).content.cloneNode(true));
      list.lastElementChild.querySelector("input, select").focus();
      return;
    }
    const row = button.closest("li");
    const near = row.nextElementSibling || row.previousElementSibling;
    const add = row.closest("fieldset").querySelector("[data-add]");
    row.remove();
    (near?.querySelector("input, select") || add).focus();
  });
})();
