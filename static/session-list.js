// What a session does makes no event: while a live one is shown, and somebody looks, it is asked for.
"use strict";

setInterval(() => {
  const isLive = document.querySelector("#live .activity");
  if (isLive && !document.hidden) htmx.trigger(document.body, "live-now");
}, 5000);
