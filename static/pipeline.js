// A pipeline's file is read here and sent as text with the form.
"use strict";

(() => {
  const text = document.getElementById("file");
  const open = document.getElementById("open-file");

  async function take(file) {
    if (!file) return;
    if (file.size > text.maxLength) {
      document.querySelector("#pipeline-form .notice").textContent =
        `${file.name} is too large: at most ${text.maxLength.toLocaleString()} bytes.`;
      return;
    }
    text.value = await file.text();
    text.focus();
  }

  open.addEventListener("change", () => {
    take(open.files[0]);
    open.value = "";
  });
  text.addEventListener("dragover", (event) => event.preventDefault());
  text.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
})();
