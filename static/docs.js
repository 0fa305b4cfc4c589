// Swagger UI over the hub's own description; calls made in it carry the CSRF token of this page.
"use strict";

(() => {
  const place = document.getElementById("swagger");
  const token = document.querySelector('meta[name="csrf-token"]').content;
  SwaggerUIBundle({
    url: place.dataset.spec,
    domNode: place,
    deepLinking: true,
    docExpansion: "none",
    validatorUrl: null,
    requestInterceptor: (request) => {
      request.headers["X-CSRF-Token"] = token;
      return request;
    },
  });
})();
