"""Training data from feedback."""
