"""Convert a GGUF file to a plain Hugging Face directory.

transformers can load the quantised file, but it refuses to save the model. So this is done once.
"""

from __future__ import annotations

import shutil
from pathlib import Path

WEIGHTS = "model.safetensors"


def to_hugging_face(gguf: Path, target: Path) -> Path:
    """Write the dequantised LLaMA model in ``gguf`` and its tokenizer to the directory ``target``.

    Weights are stored in bfloat16. Its rounding error (2**-9) is far below that of the 4-bit original. The directory
    only appears once it is complete. An existing one is kept.

    Raises:
        ValueError: the file holds an architecture other than LLaMA.
    """
    if (target / WEIGHTS).is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = quantised.config.to_dict()
    if settings["model_type"] != "llama":
        raise ValueError(f"{gguf} holds a {settings['model_type']!r} model, expected 'llama'")
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target
