"""Metrics that are plain numbers of `Health.report`: kind, name, key in the report, and help."""

from __future__ import annotations

from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

EVENT_BUS: Final = (
    (GaugeMetricFamily, "connected", "connected", "1 while Redis is connected, else 0."),
    (CounterMetricFamily, "outages", "outages", "Times that the connection to Redis was lost."),
    (
        CounterMetricFamily,
        "away_seconds",
        "seconds_away",
        "Time without Redis, the current outage included.",
    ),
    (CounterMetricFamily, "published", "published", "Messages that Redis accepted."),
    (
        CounterMetricFamily,
        "published_late",
        "published_late",
        "Published messages that had to wait for Redis.",
    ),
    (
        GaugeMetricFamily,
        "waiting",
        "waiting",
        "Messages that wait for Redis in memory. Events wait in the journal.",
    ),
    (
        GaugeMetricFamily,
        "oldest_seconds",
        "oldest_seconds",
        "Age of the oldest event that waits for Redis, in memory or in the journal.",
    ),
    (CounterMetricFamily, "unpublished", "unpublished", "Messages that were never published."),
    (
        CounterMetricFamily,
        "handler_errors",
        "handler_errors",
        "Received messages whose handler failed.",
    ),
    (CounterMetricFamily, "refused", "refused", "Received messages that were invalid and refused."),
    (CounterMetricFamily, "dropped", "dropped", "Messages that a slow listener lost."),
    (
        CounterMetricFamily,
        "pauses",
        "pauses",
        "Times that the bus stopped reading because the queue of a handler was full.",
    ),
    (GaugeMetricFamily, "listeners", "listeners", "Listeners of /events/."),
)
INBOX: Final = (
    (
        GaugeMetricFamily,
        "inbox_pending",
        "pending",
        "Entries of the inbox that a sidecar has read and not stored yet.",
    ),
    (CounterMetricFamily, "inbox_handled", "handled", "Entries of the inbox that were stored."),
    (
        CounterMetricFamily,
        "inbox_claimed",
        "claimed",
        "Entries of the inbox that this sidecar claimed from a dead one.",
    ),
    (
        CounterMetricFamily,
        "inbox_failures",
        "failures",
        "Failed attempts to store entries of the inbox.",
    ),
    (
        GaugeMetricFamily,
        "dead_letters",
        "dead",
        "Dead letters: entries of the inbox that no sidecar could store.",
    ),
)
NO_INBOX: Final = dict.fromkeys(("pending", "handled", "claimed", "failures", "dead"), 0)
"""`memory://`: nobody can add an entry."""
ROWS: Final = (
    (
        CounterMetricFamily,
        "rows_written",
        "rows_written",
        "Rows acknowledged by this sidecar.",
    ),
    (
        GaugeMetricFamily,
        "rows_waiting",
        "rows_waiting",
        "Rows that are in the journal and not yet in their tables.",
    ),
)
JOURNAL: Final = (
    (GaugeMetricFamily, "bytes", "bytes", "Size of the rows that wait in the journal."),
    (
        GaugeMetricFamily,
        "limit_bytes",
        "most_bytes",
        "Size from which the journal accepts no more rows.",
    ),
    (
        GaugeMetricFamily,
        "accepts_rows",
        "accepts_rows",
        "1 while the journal accepts rows, 0 if it or the disk is full.",
    ),
    (
        GaugeMetricFamily,
        "oldest_row_seconds",
        "oldest_seconds",
        "Age of the oldest row that waits in the journal. 0 without one.",
    ),
    (GaugeMetricFamily, "events", "events", "Events that wait in the journal for Redis."),
    (GaugeMetricFamily, "event_bytes", "event_bytes", "Size of the events that wait for Redis."),
    (
        GaugeMetricFamily,
        "oldest_event_seconds",
        "oldest_event_seconds",
        "Age of the oldest event that waits in the journal. 0 without one.",
    ),
    (
        CounterMetricFamily,
        "events_dropped",
        "events_dropped",
        "Events that the journal dropped, because they were too many or too old.",
    ),
    (
        GaugeMetricFamily,
        "requests",
        "requests",
        "Requests with an Idempotency-Key whose progress or answer the journal keeps.",
    ),
    (GaugeMetricFamily, "request_bytes", "request_bytes", "Size of these requests."),
    (
        CounterMetricFamily,
        "requests_dropped",
        "requests_dropped",
        "Requests with an Idempotency-Key that were forgotten within 24 hours.",
    ),
)
SPEECH: Final = (
    (GaugeMetricFamily, "requests_waiting", "waiting", "Texts that are spoken or wait."),
    (CounterMetricFamily, "spoken", "spoken", "Texts spoken."),
    (GaugeMetricFamily, "listeners", "listeners", "Listeners of /stream/audio."),
    (CounterMetricFamily, "lost", "lost", "Audio events that slow listeners lost."),
)
