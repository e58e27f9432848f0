"""Tests that take too long for every change, or that measure: `make test-long`."""
