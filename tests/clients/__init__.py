"""Third-party clients, unchanged, against a running sidecar: `make test-clients`.

They run in environments of their own, and start the sidecar with the Python of the project.
"""
