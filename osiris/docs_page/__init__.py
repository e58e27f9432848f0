"""`/docs`: Swagger UI from this package, and the OpenAPI document that it shows.

The page loads nothing from other servers. Its links are relative, so it works under a root path.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Final

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from pydantic_core import to_json

from osiris.paths import DOCS, OPENAPI

_FOLDER: Final = Path(__file__).parent
_FILES: Final = {
    "favicon-32x32.png": "image/png",
    "init.js": "text/javascript",
    "page.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
}
"""The only files that are served, with their content types."""
_ASSET: Final = f"{DOCS}/{{build}}/{{name}}"
_METHODS: Final = ["GET", "HEAD"]
PATHS: Final = (DOCS, _ASSET, OPENAPI)
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Swagger UI's style sheet has icons as `data:` images; it plays received audio from a `blob:`."""


def install(app: FastAPI) -> None:
    """Adds the page, its files and the document."""

    async def openapi_document(request: Request) -> Response:
        root = request.scope.get("root_path", "") or "/"
        servers = [{"url": root, "description": "This server"}]
        return Response(
            to_json(app.openapi() | {"servers": servers}), media_type="application/json"
        )

    for path in (DOCS, f"{DOCS}/"):
        app.add_api_route(path, _page, methods=_METHODS, include_in_schema=False)
    for path in (OPENAPI, f"{OPENAPI}/"):
        app.add_api_route(path, openapi_document, methods=_METHODS, include_in_schema=False)
    app.add_api_route(_ASSET, _asset, methods=_METHODS, include_in_schema=False)


def _page(request: Request) -> HTMLResponse:
    page = (_FOLDER / "index.html").read_text()
    # A browser resolves relative links against the folder of the page's path.
    folder = "" if request.scope["path"].endswith("/") else "docs/"
    return HTMLResponse(
        page.replace("{files}", folder + _build()),
        headers={"Content-Security-Policy": _CONTENT_SECURITY_POLICY},
    )


def _asset(build: str, name: str) -> FileResponse:
    if build != _build() or name not in _FILES:
        raise HTTPException(404)
    return FileResponse(
        _FOLDER / name,
        media_type=_FILES[name],
        # The path changes with the files.
        headers={"Cache-Control": "public, max-age=31536000, immutable"},
    )


@functools.cache
def _build() -> str:
    """A hash of the page's files, for their URLs."""
    whole = hashlib.sha256()
    for name in sorted(_FILES):
        whole.update((_FOLDER / name).read_bytes())
    return whole.hexdigest()[:16]
