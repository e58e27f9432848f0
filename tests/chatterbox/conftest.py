"""These tests need the package, gigabytes and minutes: `make test-chatterbox` runs them."""

from __future__ import annotations

import os

collect_ignore = [] if "CHATTERBOX_PYTHON" in os.environ else ["test_worker.py"]
