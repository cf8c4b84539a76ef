"""What every test starts from.

A shell gives its background jobs an ignored SIGINT, and their children inherit it. Tests that interrupt a process would
then wait for nothing, so the usual handler is put back; children start with the default.
"""

from __future__ import annotations

import signal
import threading


def pytest_configure() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
