"""The services of the sidecar, one per file."""
