"""llama.cpp, through llama-cpp-python. Runs in the environment of that package."""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

job = json.loads(Path(sys.argv[1]).read_text())
model = llama_cpp.Llama(
    job["base"], lora_path=job["adapter"], n_ctx=128, n_batch=128, n_ubatch=128, logits_all=True, verbose=False,
    type_k=0, type_v=0, flash_attn=False, n_threads=2,
)  # fmt: skip


def rows(tokens):
    """Log probabilities after every token, (tokens, vocabulary)."""
    model.reset()
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)], dtype=np.float64)
    top = logits.max(1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))


def greedy(prompt):
    """The most probable tokens."""
    tokens = list(prompt)
    for _ in range(job["count"]):
        tokens.append(int(rows(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


logprobs = []
for sequence in job["sequences"]:
    table = rows(sequence)
    logprobs.append([float(table[k][token]) for k, token in enumerate(sequence[1:])])
found = {
    "version": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
    "logprobs": logprobs,
    "answers": [greedy(prompt) for prompt in job["prompts"]],
}
Path(sys.argv[2]).write_text(json.dumps(found))
