// The keys that a phone's keyboard does not have, as buttons under the terminal.

const ARROWS = { up: "A", down: "B", right: "C", left: "D" };
const PLAIN = { esc: "\x1b", tab: "\t", interrupt: "\x03" };

// As a terminal sends it with Ctrl held down; null for what has no such form.
export function withCtrl(char) {
  if (char === " ") return "\0";
  if (char === "?") return "\x7f";
  return /^[@-_a-z]$/.test(char) ? String.fromCharCode(char.toUpperCase().charCodeAt(0) & 0x1f) : null;
}

// bar: its buttons name their keys (data-key). `hold` passes on what is typed, with Ctrl if that
// was pressed before.
export function keyBar(bar, term, askPaste) {
  const ctrl = bar.querySelector('[data-key="ctrl"]');
  const isHeld = () => ctrl.getAttribute("aria-pressed") === "true";
  const press = (held) => ctrl.setAttribute("aria-pressed", String(held));

  function arrow(letter) {
    if (isHeld()) return `\x1b[1;5${letter}`;
    return `\x1b${term.modes.applicationCursorKeysMode ? "O" : "["}${letter}`;
  }

  function hit(key) {
    if (key === "ctrl") {
      press(!isHeld());
      term.focus(); // the next key is typed there
    } else if (key === "paste") {
      askPaste();
    } else {
      const data = key in ARROWS ? arrow(ARROWS[key]) : PLAIN[key];
      press(false);
      term.input(data);
    }
  }

  // The focus, and with it the keyboard on the screen, stays where it is.
  bar.addEventListener("mousedown", (event) => event.preventDefault());
  bar.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button) hit(button.dataset.key);
  });
  return {
    show: (shown) => { bar.hidden = !shown; },
    hold(data) {
      if (!isHeld()) return data;
      press(false);
      return withCtrl(data) ?? data;
    },
  };
}
