"""A language model in a worker process on this machine; a supervisor keeps the process running."""
