// Starts Swagger UI. It asks nobody but this server, and keeps a key in memory only.
"use strict";

// This file is served at docs/<build>/init.js, so the document is two folders up.
const specification = new URL("../../openapi.json", document.currentScript.src);

SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: specification.href,
  deepLinking: true,
  persistAuthorization: false,
  queryConfigEnabled: false,
  validatorUrl: null,
});
