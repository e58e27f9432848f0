"""The sidecar without its HTTP side: models, proposals, database, event bus, speech."""

__version__ = "0.2.0"
