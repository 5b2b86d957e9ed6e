"""vLLM's LLM class with a LoRA request. Runs in vLLM's environment."""

import json
import sys
from pathlib import Path


def main():
    import vllm
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(sys.argv[1]).read_text())
    model = LLM(
        model=job["base"], enable_lora=True, max_lora_rank=job["rank"], dtype="float32", enforce_eager=True,
        max_model_len=128, max_num_seqs=4, seed=0,
    )  # fmt: skip
    adapter = LoRARequest("mine", 1, job["adapter"])
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = model.generate([TokensPrompt(prompt_token_ids=s) for s in job["sequences"]], scoring, lora_request=adapter)
    logprobs = []
    for tokens, output in zip(job["sequences"], scored, strict=True):
        logprobs.append([output.prompt_logprobs[k][tokens[k]].logprob for k in range(1, len(tokens))])
    greedy = SamplingParams(temperature=0, max_tokens=job["count"], min_tokens=job["count"], ignore_eos=True)
    answers = model.generate([TokensPrompt(prompt_token_ids=p) for p in job["prompts"]], greedy, lora_request=adapter)
    found = {"version": f"vLLM {vllm.__version__}", "logprobs": logprobs,
             "answers": [list(a.outputs[0].token_ids) for a in answers]}  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
