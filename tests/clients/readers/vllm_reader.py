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
    # prompt_logprobs with an adapter fail on CPUs (vLLM 0.32), so the answers' own are taken
    greedy = SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True, logprobs=0)
    answers = model.generate([TokensPrompt(prompt_token_ids=p) for p in job["prompts"]], greedy, lora_request=adapter)
    outputs = [answer.outputs[0] for answer in answers]
    logprobs = [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
    found = {"version": f"vLLM {vllm.__version__}", "logprobs": logprobs,
             "answers": [list(output.token_ids) for output in outputs]}  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
