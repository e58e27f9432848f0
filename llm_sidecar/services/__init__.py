"""What the sidecar does, one service a file."""
