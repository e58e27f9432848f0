"""Telemetry of the sidecar: metrics, traces, errors and profiles."""
