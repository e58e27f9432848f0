"""Profiles of requests: where the event loop spent its time, and where each model call did.

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

from llm_sidecar.telemetry.calls import ModelCall
from llm_sidecar.telemetry.instruments import Instrument
from llm_sidecar.telemetry.paths import is_observed, route_path
from llm_sidecar.telemetry.profile_page import render

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_STREAMS: Final = "/stream/"
"""Prefix of the paths of streams. A stream can last for days, and its samples would fill memory."""

_INTERVAL: Final = 0.01
"""Seconds between two samples, of which each costs every request of the moment some time."""
_PER_SECOND: Final = 0.1
_AT_ONCE: Final = 3.0
"""Requests that are profiled, in the long run and at once: samples cost some percent of a core, and
under load the latest profile is as good as any."""

_CALLS: ContextVar[list[ModelCall] | None] = ContextVar("profiled_calls", default=None)


@dataclass(slots=True)
class Profile:
    """One profiled request.

    Attributes:
        began: when it came in.
        method: of HTTP.
        route: the template of its path.
        status: that it was answered with; 500 where it was not.
        seconds: from its beginning to the end of its answer.
        calls: of models, in the order in which they ended.
        session: the samples of the event loop's thread.
    """

    began: datetime.datetime
    method: str
    route: str = ""
    status: int = 500
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
        """Profiles requests, and lets routes find the profiles at `app.state.profiles`."""
        app.state.profiles = self
        app.add_middleware(_ProfileRequests, profiling=self)

    def latest(self, path: str | None = None) -> Profile | None:
        """The latest profile, of one route or of any, or None.

        Args:
            path: the template of the route, with or without its trailing slash.
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
        """Replaces the latest of its route, and is the latest of all."""
        self._profiles.pop(_key(profile.route), None)
        self._profiles[_key(profile.route)] = profile

    def call_finished(self, call: ModelCall) -> None:
        """Adds the call to the profile of the request that it belongs to."""
        calls = _CALLS.get()
        if calls is not None:
            calls.append(call)


class _ProfileRequests:
    """ASGI middleware that profiles requests, each in a context of its own."""

    def __init__(self, app: ASGIApp, profiling: Profiling) -> None:
        self._app = app
        self._profiling = profiling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_profiled(scope) or not self._profiling.admits():
            await self._app(scope, receive, send)
            return
        profile = Profile(datetime.datetime.now(datetime.UTC), scope["method"])
        began = time.monotonic()

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                profile.status = message["status"]
            await send(message)

        token = _CALLS.set(profile.calls)
        # Awaited work is followed into the tasks it starts, whose contexts are copies of this one.
        profiler = Profiler(_INTERVAL, async_mode="enabled")
        profiler.start()
        try:
            await self._app(scope, receive, send_and_note)
        finally:
            profile.session = profiler.stop()
            profile.seconds = time.monotonic() - began
            _CALLS.reset(token)
            route = getattr(scope.get("route"), "path", None)
            # What matches no route has no bounded name, and nothing to look at.
            if route is not None:
                profile.route = route
                self._profiling.keep(profile)


def _is_profiled(scope: Scope) -> bool:
    if scope["type"] != "http":
        return False
    return is_observed(scope) and not route_path(scope).startswith(_STREAMS)


def _key(path: str) -> str:
    return path.rstrip("/")
