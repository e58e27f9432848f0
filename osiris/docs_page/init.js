// Starts Swagger UI. It contacts only this server, and keeps a key only in memory.
"use strict";

// This file is served at docs/<build>/init.js, so the document is two folders up.
const specification = new URL("../../openapi.json", document.currentScript.src);

// Swagger UI would request the audio a second time, with GET. Give it the audio that it has received.
function PlayReceivedAudio() {
  return {
    wrapComponents: {
      responseBody: (Original, { React }) =>
        function ResponseBody(props) {
          const { content, url } = props;
          const source = React.useMemo(
            () => (content instanceof Blob ? URL.createObjectURL(content) : url),
            [content, url],
          );
          return React.createElement(Original, { ...props, url: source });
        },
    },
  };
}

SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: specification.href,
  deepLinking: true,
  persistAuthorization: false,
  plugins: [PlayReceivedAudio],
  queryConfigEnabled: false,
  validatorUrl: null,
});
