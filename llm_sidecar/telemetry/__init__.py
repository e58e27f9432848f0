"""What the sidecar tells about itself: metrics, traces, errors and profiles."""
