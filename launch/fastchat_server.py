"""Serve a model directory with FastChat's servers, as an OpenAI-compatible judge or answering model, until interrupted.

    python launch/fastchat_server.py MODEL --name NAME [--port 8000] [--device cuda] [--conv-template vicuna_v1.1]

Starts FastChat's controller, model worker and API server on the loopback interface and prints a line when they are
ready. Needs `pip install "fschat[model_worker]"`.

transformers 5 always provides a rope dictionary, and FastChat 0.2.36 expects a "factor" in it. So the worker gets a
copy of config.json with a factor of 1, which changes no result. Do not use streaming: FastChat 0.2.36 fails there with
pydantic 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

START_SECONDS = 600.0
ROPE_KEYS = ("rope_parameters", "rope_scaling")


def served_copy(model: Path, folder: Path) -> Path:
    """Fill ``folder`` with links to the model's files and a copy of its config that has a rope factor."""
    for file in model.resolve().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    present = [key for key in ROPE_KEYS if isinstance(config.get(key), dict)]
    if not present:
        config["rope_parameters"] = {"rope_theta": config.get("rope_theta", 10000.0)}
    for key in present or ["rope_parameters"]:
        if "factor" not in config[key]:
            config[key] |= {"rope_type": "linear", "factor": 1.0}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def commands(model: Path, name: str, port: int, device: str, conv_template: str | None) -> list[list[str]]:
    """Command lines of controller, worker and API server, in the order in which they are started."""
    controller, worker = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    serve = [sys.executable, "-m"]
    template = ["--conv-template", conv_template] if conv_template else []
    return [
        [*serve, "fastchat.serve.controller", "--host", "127.0.0.1", "--port", controller.rpartition(":")[2]],
        [*serve, "fastchat.serve.model_worker", "--model-path", str(model), "--model-names", name, "--device", device,
         "--host", "127.0.0.1", "--port", worker.rpartition(":")[2], "--controller-address", controller,
         "--worker-address", worker, *template],
        [*serve, "fastchat.serve.openai_api_server", "--host", "127.0.0.1", "--port", str(port),
         "--controller-address", controller],
    ]  # fmt: skip


@contextlib.contextmanager
def running(lines: Sequence[Sequence[str]], logs: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run the commands as processes that log to ``logs``. They are stopped when the block ends, for whatever reason."""
    environment = {**os.environ, "LOGDIR": str(logs), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        try:
            for line in lines:
                log = stack.enter_context(open(logs / f"{line[2]}.txt", "wb"))
                started.append(subprocess.Popen(line, env=environment, cwd=logs, stdout=log, stderr=log))
                if len(started) == 1:
                    wait_for_port(int(line[-1]), started)
            yield started
        finally:
            for process in started:
                process.terminate()
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()


def wait_for_port(port: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until something listens on ``port``. The controller must do so before the other servers contact it."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        check_alive(processes)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise SystemExit(f"error: nothing listens on port {port} after {START_SECONDS:.0f} s")


def wait_for_model(url: str, name: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until the API server lists the model."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        check_alive(processes)
        with (
            contextlib.suppress(urllib.error.URLError, OSError, ValueError),
            direct.open(f"{url}/models", timeout=5) as r,
        ):
            if name in [model["id"] for model in json.load(r)["data"]]:
                return
        time.sleep(0.5)
    raise SystemExit(f"error: {url} does not list {name} after {START_SECONDS:.0f} s")


def check_alive(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Raise SystemExit with the command of a process that has ended, if there is one."""
    for process in processes:
        if process.poll() is not None:
            raise SystemExit(f"error: {process.args!r} ended with status {process.returncode}; see its log")


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model with FastChat's servers on the loopback.")
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("--name", required=True, help="model name that clients use")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--conv-template", help="FastChat's name of the chat template (default: guessed from the path)")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs (default: a temporary one)")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        raise SystemExit(f"error: {args.model} holds no config.json: give a model directory")
    for wanted in (signal.SIGTERM, signal.SIGINT):  # SIGINT is ignored if a shell started this with &
        signal.signal(wanted, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as temporary:
        logs = (args.logs or Path(temporary) / "logs").resolve()
        logs.mkdir(parents=True, exist_ok=True)
        copy = Path(temporary) / (args.model.resolve().name or "model")
        copy.mkdir()
        lines = commands(served_copy(args.model, copy), args.name, args.port, args.device, args.conv_template)
        url = f"http://127.0.0.1:{args.port}/v1"
        try:
            with running(lines, logs) as processes:
                wait_for_model(url, args.name, processes)
                print(f"ready: --base-url {url} --judge-model {args.name} (logs: {logs})", flush=True)
                while True:
                    check_alive(processes)
                    time.sleep(1)
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
