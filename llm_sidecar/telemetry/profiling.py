"""Profiles of requests: where the event loop and each model call spent their time.

    profiling = Profiling()
    profiling.install(app)
    page = profiling.latest("/generate/phi3/").page()

Only the latest profile of each route is kept.
"""

from __future__ import annotations

import datetime
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyinstrument import Profiler
from pyinstrument.session import Session

from llm_sidecar.telemetry.asgi import TrackedSend, is_observed, route_path
from llm_sidecar.telemetry.base import Instrument
from llm_sidecar.telemetry.calls import ModelCall
from llm_sidecar.telemetry.profile_page import render

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

_STREAMS: Final = "/stream/"
"""Prefix of the paths of streams. A stream can last for days, and its samples would fill memory."""

_INTERVAL: Final = 0.01
"""Seconds between two samples. Each sample delays every running request."""
_PER_SECOND: Final = 0.1
_AT_ONCE: Final = 3.0
"""Profiled requests per second on average, and the maximum burst. Sampling takes a few percent of a
core, and under load any profile is as good as another."""
_NO_RESPONSE: Final = 500

_CALLS: ContextVar[list[ModelCall] | None] = ContextVar("profiled_calls", default=None)


@dataclass(slots=True)
class Profile:
    """One profiled request.

    Attributes:
        began: when the request arrived.
        method: its HTTP method.
        route: the template of its path.
        status: of its response; 500 without a response.
        seconds: until the response was complete.
        calls: its model calls, in the order in which they ended.
        session: the samples of the event loop's thread.
    """

    began: datetime.datetime
    method: str
    route: str = ""
    status: int = _NO_RESPONSE
    seconds: float = 0.0
    calls: list[ModelCall] = field(default_factory=list)
    session: Session | None = None

    def page(self, nonce: str = "") -> str:
        """The profile as a self-contained HTML page; rendering takes a moment.

        Args:
            nonce: the nonce of the page's content security policy.
        """
        assert self.session is not None
        heading = (
            f"{self.method} {self.route}: {self.status} after {self.seconds:.3f} s, "
            f"{self.began:%Y-%m-%d %H:%M:%S} UTC"
        )
        return render(heading, self.calls, self.session, nonce)


class Profiling(Instrument):
    """The latest profile of each route."""

    def __init__(self) -> None:
        self._profiles: dict[str, Profile] = {}
        self._allowance = _AT_ONCE
        self._replenished = time.monotonic()

    def install(self, app: FastAPI) -> None:
        """Adds the middleware, and sets `app.state.profiles` for the route that shows them."""
        app.state.profiles = self
        app.add_middleware(_ProfileRequests, profiling=self)

    def latest(self, path: str | None = None) -> Profile | None:
        """The latest profile, or None.

        Args:
            path: the template of a route, with or without its trailing slash; None for any route.
        """
        if path is not None:
            return self._profiles.get(_key(path))
        return next(reversed(self._profiles.values()), None)

    def admits(self) -> bool:
        """Whether one more request may be profiled now (a token bucket)."""
        now = time.monotonic()
        gained = (now - self._replenished) * _PER_SECOND
        self._allowance = min(_AT_ONCE, self._allowance + gained)
        self._replenished = now
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True

    def keep(self, profile: Profile) -> None:
        """Keeps the profile as the latest of its route and the latest of all."""
        self._profiles.pop(_key(profile.route), None)
        self._profiles[_key(profile.route)] = profile

    def call_finished(self, call: ModelCall) -> None:
        """Adds the call to the profile of its request."""
        calls = _CALLS.get()
        if calls is not None:
            calls.append(call)


class _ProfileRequests:
    """ASGI middleware that profiles requests."""

    def __init__(self, app: ASGIApp, profiling: Profiling) -> None:
        self._app = app
        self._profiling = profiling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_profiled(scope) or not self._profiling.admits():
            await self._app(scope, receive, send)
            return
        profile = Profile(datetime.datetime.now(datetime.UTC), scope["method"])
        began = time.monotonic()
        response = TrackedSend(send)
        token = _CALLS.set(profile.calls)
        # It also samples the tasks that the request starts: their contexts are copies of this one.
        profiler = Profiler(_INTERVAL, async_mode="enabled")
        profiler.start()
        try:
            await self._app(scope, receive, response)
        finally:
            profile.session = profiler.stop()
            profile.status = response.status or _NO_RESPONSE
            profile.seconds = time.monotonic() - began
            _CALLS.reset(token)
            route = getattr(scope.get("route"), "path", None)
            # A path without a route has no bounded name, and there is nothing to profile.
            if route is not None:
                profile.route = route
                self._profiling.keep(profile)


def _is_profiled(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    return is_observed(scope) and not route_path(scope).startswith(_STREAMS)


def _key(path: str) -> str:
    return path.rstrip("/")
