"""lm-eval's Hugging Face model with a PEFT adapter: log-likelihoods of answers. Runs in the environment of lm-eval."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from lm_eval.models.huggingface import HFLM

job = json.loads(Path(sys.argv[1]).read_text())
model = HFLM(pretrained=job["base"], peft=job["adapter"], dtype="float32", device="cpu", batch_size=1)
requests = [(("", ""), s[: len(p)], s[len(p) :]) for p, s in zip(job["prompts"], job["sequences"], strict=True)]
found = model._loglikelihood_tokens(requests, disable_tqdm=True)
answer = {"version": f"lm-eval {version('lm-eval')}", "sums": [float(value) for value, _ in found],
          "greedy": [bool(same) for _, same in found]}  # fmt: skip
Path(sys.argv[2]).write_text(json.dumps(answer))
