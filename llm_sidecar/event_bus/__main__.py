"""The command line `python -m llm_sidecar.event_bus`, which reads the streams in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Final

import typer
from redis.exceptions import RedisError

from llm_sidecar import command_line, timestamps
from llm_sidecar.errors import CommandFailed
from llm_sidecar.event_bus.dead_letters import DeadLetter, DeadLetters
from llm_sidecar.event_bus.followed_stream import BEGINNING, Entry, EntryId, FollowedStream, Gap
from llm_sidecar.event_bus.redis_errors import reason
from llm_sidecar.event_bus.redis_url import MEMORY, close_client, make_client, masked
from llm_sidecar.settings import Settings

PROG: Final = "python -m llm_sidecar.event_bus"
PAGE: Final = 500
SHOWN: Final = 80
"""Characters of a field of a dead letter that are shown without `--full`."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command_line.run_app(app, arguments, PROG)


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    """Read the stream of events and the dead letters of the inbox, in the Redis at REDIS_URL."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _since(text: str) -> datetime.datetime:
    try:
        return timestamps.since(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _entry_id(text: str) -> EntryId:
    try:
        return EntryId.parse(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not an id such as 1769850000000-0.") from None


@app.command("tail")
def _tail(as_json: AsJson = False) -> None:
    """Show new events, until Ctrl-C."""

    async def work(events: FollowedStream, _: DeadLetters) -> None:
        async with contextlib.aclosing(events.follow(await events.end())) as feed:
            async for item in feed:
                _show_event(item, as_json)
                sys.stdout.flush()

    _run(work)


@app.command("replay")
def _replay(
    after: Annotated[
        EntryId | None,
        typer.Argument(parser=_entry_id, metavar="[ID]", help="Only events after this entry."),
    ] = None,
    since: Annotated[
        datetime.datetime | None,
        typer.Option(
            parser=_since,
            metavar="TIME",
            help="Only events added since then: ISO 8601 (UTC without an offset), or an age such "
            "as 24h or 7d.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the events that the stream has, oldest first."""

    async def work(events: FollowedStream, _: DeadLetters) -> None:
        position, last = after or BEGINNING, await events.end()
        if since is not None:
            # The place before the first entry of that millisecond.
            position = max(position, EntryId(int(since.timestamp() * 1000) - 1, (1 << 64) - 1))
        while position < last and (page := await events.page(position, PAGE)).items:
            for item in page.items:
                _show_event(item, as_json)
            position = page.position

    _run(work)


@app.command("dead")
def _dead(
    last: Annotated[int, typer.Option(min=1, help="How many dead letters at most.")] = 20,
    full: Annotated[bool, typer.Option("--full", help="Do not shorten their fields.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the dead letters of the inbox, newest first."""

    async def work(_: FollowedStream, dead: DeadLetters) -> None:
        letters = await dead.page(last)
        for letter in letters:
            _show_letter(letter, full, as_json)
        if not letters and not as_json:
            typer.echo("There are no dead letters.")

    _run(work)


@app.command("requeue")
def _requeue(
    which: Annotated[
        str, typer.Argument(metavar="ID|all", help="The id of a dead letter, or all.")
    ],
) -> None:
    """Put dead letters back into the inbox."""

    async def work(_: FollowedStream, dead: DeadLetters) -> None:
        ids = [which] if which != "all" else await _all_ids(dead)
        for dead_id in ids:
            typer.echo(f"{dead_id} is back in the inbox as {await dead.requeue(dead_id)}")
        if not ids:
            typer.echo("There are no dead letters.")

    _run(work)


async def _all_ids(dead: DeadLetters) -> list[str]:
    """The ids of all dead letters, oldest first."""
    ids: list[str] = []
    while page := await dead.page(PAGE, before=ids[-1] if ids else None):
        ids += [letter.id for letter in page]
    return ids[::-1]


def _run(work: Callable[[FollowedStream, DeadLetters], Awaitable[None]]) -> None:
    """Runs a command with the Redis of the settings.

    Raises:
        SettingsError: a setting is not valid.
        CommandFailed: Redis is away, or denies the command.
    """
    settings = Settings.from_environ().events
    url = settings.url.get_secret_value()
    if url.startswith(MEMORY):
        raise CommandFailed(
            "REDIS_URL=memory:// is inside one process: read its events over HTTP, at /events/"
        )

    async def with_redis() -> None:
        client = make_client(url)
        try:
            await work(FollowedStream(client, settings.stream), DeadLetters(client))
        finally:
            await close_client(client)

    try:
        asyncio.run(with_redis())
    except RedisError as error:
        raise CommandFailed(f"Redis at {masked(url)} cannot be used: {reason(error)}") from None


def _show_event(item: Entry | Gap, as_json: bool) -> None:
    if isinstance(item, Gap):
        if item.after != BEGINNING:
            command_line.say(f"Redis may have removed events between {item.after} and {item.to}.")
    elif as_json:
        typer.echo(json.dumps({"entry": str(item.id), **item.fields}))
    else:
        fields = [item.fields.get(name, "") for name in ("time", "type", "data")]
        typer.echo("  ".join(map(_one_line, [item.id, *fields])))


def _show_letter(letter: DeadLetter, full: bool, as_json: bool) -> None:
    fields = {
        name: value if full or len(value) <= SHOWN else f"{value[:SHOWN]}…"
        for name, value in letter.fields.items()
    }
    if as_json:
        typer.echo(json.dumps(letter.as_json() | {"fields": fields}))
        return
    shown = (letter.id, letter.time, letter.reason, json.dumps(fields, ensure_ascii=False))
    typer.echo("  ".join(map(_one_line, shown)))


def _one_line(text: Any) -> str:
    # Text of other services may contain control characters of the terminal.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


if __name__ == "__main__":
    sys.exit(main())
