"""A process without a launcher finds a port, also if another process is faster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

CODE = """
import sys
from salient_ds.zero import environment
free, taken = environment.free_port, iter([int(sys.argv[1])])
environment.free_port = lambda: next(taken, None) or free()
print("device", environment.start(1.0))
environment.stop()
"""


def test_taken_port_is_left_for_another() -> None:
    unlaunched = {k: v for k, v in os.environ.items() if k not in ("MASTER_PORT", "MASTER_ADDR", "RANK", "WORLD_SIZE")}
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        port = other.getsockname()[1]
        found = subprocess.run(
            [sys.executable, "-c", CODE, str(port)], env=unlaunched, capture_output=True, text=True, timeout=240
        )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "device" in found.stdout
