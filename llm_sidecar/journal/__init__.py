"""The journal: the only place where rows, events and the progress of requests become durable.

It is one SQLite file that all processes of a machine share. `db.mover` moves its rows to LanceDB,
and `event_bus.relay` its events to Redis.
"""
