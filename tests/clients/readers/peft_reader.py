"""PEFT: logprobs of given tokens, and greedy answers; also after merging. Runs in another environment."""

import json
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers

job = json.loads(Path(sys.argv[1]).read_text())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    base = transformers.AutoModelForCausalLM.from_pretrained(job["base"], torch_dtype=torch.float32)
    if job.get("load_adapter"):
        model = base
        model.load_adapter(job["adapter"])
    else:
        model = peft.PeftModel.from_pretrained(base, job["adapter"])
lost = [str(item.message) for item in caught if "missing adapter keys" in str(item.message)]


@torch.no_grad()
def logprobs(model, tokens):
    logits = model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).flatten().tolist()


@torch.no_grad()
def greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


model.eval()
found = {
    "version": f"PEFT {peft.__version__}, transformers {transformers.__version__}",
    "lost": lost,
    "logprobs": [logprobs(model, tokens) for tokens in job["sequences"]],
    "answers": [greedy(model, prompt, job["count"]) for prompt in job["prompts"]],
}
if not job.get("load_adapter"):
    merged = model.merge_and_unload()
    found["merged_logprobs"] = [logprobs(merged, tokens) for tokens in job["sequences"]]
Path(sys.argv[2]).write_text(json.dumps(found))
