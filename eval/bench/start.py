"""Seconds and memory until a process holds its tokenised data: without the cache, on the first start and on the second.

    python -m salient_eval.bench.start --tokenizer MODEL --rows 1000000 --processes 2

Every start is a set of new processes that begin together, as those of one machine do. Memory is what the kernel counts
for a process beyond what it held before: "private" is its own alone, "resident" has pages of mapped files too, which
all processes share.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_WORDS = ("red", "blue", "green", "stone", "river", "cloud", "bread", "sugar", "light", "winter", "summer", "horse")


def write_rows(path: Path, rows: int) -> None:
    """Alpaca rows of 16 to 64 words, as JSON lines; the same for the same number."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            words = draw.choices(_WORDS, k=draw.randint(8, 32))
            row = {"instruction": "Reverse the words.", "input": " ".join(words), "output": " ".join(reversed(words))}
            file.write(json.dumps(row) + "\n")


def one_start(tokenizer: str, data: str, cache: str | None) -> dict[str, Any]:
    """What a process does with the data before its first step. Seconds do not count the imports."""
    from transformers import AutoTokenizer

    from salient_ds.config.data import DataConfig
    from salient_ds.data.templates import get_template
    from salient_ds.run.tokenised import read_part

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    before = _memory()
    began = time.perf_counter()
    config = DataConfig.model_validate({"train": data, "cache": cache is not None, "cache_dir": cache})
    rows, notes = read_part("train", data, config, loaded, get_template(config.template), False)
    digest, targets = rows.fingerprint(), int(rows.num_targets.sum())
    seconds = time.perf_counter() - began
    after = _memory()
    used = {f"{kind}_mib": round((after[kind] - before[kind]) / 1024) for kind in before}
    return {
        "seconds": round(seconds, 1),
        **used,
        "rows": len(rows),
        "targets": targets,
        "sha256": digest,
        "note": notes[-1],
    }


def _memory() -> dict[str, int]:
    """KiB of this process."""
    values = {
        line.split()[0]: int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    }
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"private": values["Private_Dirty:"], "resident": values["Rss:"], "peak": int(peak.split()[1])}


def _start(processes: int, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "salient_eval.bench.start", "--child", *arguments]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def main() -> None:
    """Print one JSON line per process of each start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--starts", default="without,first,second", help="which of them, in this order")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        data, *cache = options.child
        print(json.dumps(one_start(options.tokenizer, data, cache[0] if cache else None)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder) / "rows.jsonl", Path(folder) / "cache"
        write_rows(data, options.rows)
        print(f"{options.rows:,} rows, {data.stat().st_size / 2**20:,.0f} MiB", flush=True)
        for name in options.starts.split(","):
            tail = [str(data), *([] if name == "without" else [str(cache)]), "--tokenizer", options.tokenizer]
            for result in _start(options.processes, *tail):
                print(name, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
