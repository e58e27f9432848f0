"""`/docs`: its files and their headers."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI

from osiris import docs_page
from tests.unit.asgi import client

FOLDER = Path(docs_page.__file__).parent


class Links(HTMLParser):
    """What a page fetches, and whether it has inline scripts or styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.urls += [url for name in ("src", "href") if (url := given.get(name))]
        if (tag == "script" and "src" not in given) or tag == "style" or "style" in given:
            self.inline.append(tag)


@pytest.mark.parametrize("root_path", ["", "/desk"])
@pytest.mark.parametrize("spelling", ["/docs", "/docs/"])
async def test_every_link_of_the_page_leads_to_a_file(
    app: FastAPI, root_path: str, spelling: str
) -> None:
    async with client(app, root_path) as asking:
        page = await asking.get(root_path + spelling)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        links = Links(page.text)
        assert links.inline == []
        assert len(links.urls) == 5
        for link in links.urls:
            url = urljoin(root_path + spelling, link)
            assert url.startswith(f"{root_path}/docs/")
            assert (await asking.get(url)).status_code == 200
        # init.js computes this path.
        assert urljoin(urljoin(root_path + spelling, links.urls[-1]), "../../openapi.json") == (
            f"{root_path}/openapi.json"
        )


async def test_the_page_has_a_strict_policy(asking: httpx.AsyncClient) -> None:
    policy = (await asking.get("/docs")).headers["content-security-policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "media-src": "blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("init.js", "text/javascript; charset=utf-8"),
        ("page.css", "text/css; charset=utf-8"),
        ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
        ("swagger-ui.css", "text/css; charset=utf-8"),
        ("favicon-32x32.png", "image/png"),
    ],
)
async def test_a_file_is_kept_by_browsers_under_a_path_that_changes_with_it(
    asking: httpx.AsyncClient, name: str, kind: str
) -> None:
    links = Links((await asking.get("/docs/")).text).urls
    (link,) = [link for link in links if link.endswith(f"/{name}")]
    answer = await asking.get(f"/docs/{link}")
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == kind
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"
    head = await asking.head(f"/docs/{link}")
    assert (head.status_code, head.content) == (200, b"")
    assert (await asking.get(f"/docs/0123456789abcdef/{name}")).status_code == 404


@pytest.mark.parametrize(
    "name",
    ["README.md", "index.html", "__init__.py", "../server.py", "..%2fserver.py", "%2e%2e", ""],
)
async def test_no_other_file_is_served(asking: httpx.AsyncClient, name: str) -> None:
    build = Links((await asking.get("/docs/")).text).urls[0].partition("/")[0]
    assert (await asking.get(f"/docs/{build}/{name}")).status_code == 404


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect"])
async def test_the_other_pages_of_fastapi_do_not_exist(
    asking: httpx.AsyncClient, path: str
) -> None:
    answer = await asking.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-security-policy"] == (
        "default-src 'none'; frame-ancestors 'none'"
    )


def test_the_files_of_swagger_ui_are_those_that_were_published() -> None:
    table = re.findall(r"\| `([^`]+)` \| `([0-9a-f]{64})` \|", (FOLDER / "README.md").read_text())
    sums = {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name, _ in table}
    assert sums == dict(table)
    ours = {"__init__.py", "README.md", "index.html", "init.js", "page.css"}
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == ours | set(sums)
