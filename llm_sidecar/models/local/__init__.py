"""A language model on this machine: a worker process holds it, a supervisor keeps that running."""
