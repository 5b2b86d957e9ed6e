"""Load a model with its adapter and continue batches of prompts.

Shapes: B = rows of a batch, P = tokens of the longest prompt, I/O = in/out features, r = rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from salient_ds.adapters.targets import is_shortcut
from salient_ds.engine.shard_files import CheckpointError
from salient_ds.export.fold import LoraPair, delta_weight, fold
from salient_ds.export.lora_config import read_lora_config
from salient_ds.heterolora.export import load_shortcuts
from salient_ds.run.export import read_factors

from .answer_file import TurnResult, prompt_too_long
from .answering import Prompt
from .sampling import RowStops, SeededSampler, cut_answer
from .sources import RECORD_FILE, SHORTCUT_FILE, ModelSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def local_device() -> torch.device:
    """Return this process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def load_answering(source: ModelSource, dtype: torch.dtype, device: torch.device, split: bool = False) -> Any:
    """Load the model in ``dtype`` on ``device``, with its adapter in fp32 beside the frozen weights.

    PEFT loads an adapter directory. Without PEFT, and for run directories, our own folded factors are used.

    Args:
        split: divide the model over the processes of the group (see tensor_parallel.py). The adapter is then merged
            into the weights, in their dtype.

    Raises:
        ValueError: weights are missing, the adapter does not fit the base, or only PEFT can load the adapter and it is
            not installed.
    """
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            source.base, revision=source.revision, trust_remote_code=source.trust_remote_code, dtype=dtype,
            output_loading_info=True,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"cannot load {source.base}: {error}") from None
    if info["missing_keys"]:
        raise ValueError(f"{source.base} lacks weights of the model, for example {sorted(info['missing_keys'])[:3]}")
    if not split:
        return _adapted(model.to(device).eval(), source)
    from .tensor_parallel import split_model

    adapted = _adapted(model.eval(), source, merge=True)
    return split_model(adapted, dtype)


def _adapted(model: nn.Module, source: ModelSource, merge: bool = False) -> Any:
    if source.update is None:
        return model
    put = merge_into if merge else attach
    if source.kind == "run":
        put(model, _pairs_of_run(source.update))
        return model
    if (source.update / SHORTCUT_FILE).is_file():
        if merge:
            raise ValueError(f"{source.update} has shortcuts, which tensor parallelism cannot split: leave it out")
        return load_shortcuts(model, source.update).eval()
    try:
        from peft import PeftModel
    except ImportError:
        put(model, read_exported(source.update))
        return model
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(source.update))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"PEFT cannot put {source.update} on its base: {error}") from None
    return (adapted.merge_and_unload() if merge else adapted).eval()


def _pairs_of_run(checkpoint: Path) -> list[LoraPair]:
    try:
        factors = read_factors(checkpoint)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    if any(is_shortcut(item.name) for item in factors):
        raise ValueError(
            f"{checkpoint} is of a run with shortcuts: give the directory of its adapter (output_dir/adapter, or what "
            "`salient-ds export` wrote)"
        )
    return [pair for pair in map(fold, factors) if pair is not None]


def read_exported(folder: Path) -> list[LoraPair]:
    """Read the factors of an adapter that ``salient-ds export`` wrote, without PEFT. Scales are multiplied into B.

    Raises:
        ValueError: the adapter has another origin, or holds whole modules.
    """
    from safetensors.torch import load_file

    if not (folder / RECORD_FILE).is_file():
        raise ValueError(f"{folder} was not written by salient-ds export: pip install peft to load it")
    stated = read_lora_config(folder)
    if whole := stated.values.get("modules_to_save"):
        raise ValueError(f"{folder} holds whole modules {whole}: pip install peft to load it")
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = []
    for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
        stored = key.removesuffix(".lora_A.weight")
        name, B_Or = stored.removeprefix("base_model.model."), tensors[f"{stored}.lora_B.weight"].float()
        pairs.append(LoraPair(name, tensors[key].float(), B_Or * stated.scaling(name)))
    return pairs


def attach(model: nn.Module, pairs: Sequence[LoraPair]) -> None:
    """Add B A x to the output of every adapted linear layer. The base weights are not changed."""
    for pair in pairs:
        layer, weight = _adapted_layer(model, pair)
        layer.register_forward_hook(_Update(pair.A_rI.to(weight.device), pair.B_Or.to(weight.device)))


@torch.no_grad()
def merge_into(model: nn.Module, pairs: Sequence[LoraPair]) -> None:
    """Add B A to the weight of every adapted linear layer, in fp32. The sum is rounded once to the weight's dtype."""
    for pair in pairs:
        weight = _adapted_layer(model, pair)[1]
        weight.copy_(weight.float() + delta_weight(pair).to(weight.device))


def _adapted_layer(model: nn.Module, pair: LoraPair) -> tuple[nn.Module, Tensor]:
    """Return the layer that a pair belongs to, and its weight (O, I)."""
    try:
        layer = model.get_submodule(pair.name)
    except AttributeError:
        raise ValueError(f"the base model has no {pair.name}: is it the one that was trained?") from None
    expected = (pair.B_Or.shape[0], pair.A_rI.shape[1])
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != expected:
        raise ValueError(f"{pair.name} is {tuple(weight.shape)}, its adapter {expected}: is it the one trained?")
    return layer, weight


class _Update:
    """Forward hook that adds the update. The sum is fp32 and is rounded once, as in PEFT."""

    def __init__(self, A_rI: Tensor, B_Or: Tensor) -> None:
        self.A_Ir, self.B_rO = A_rI.T.contiguous(), B_Or.T.contiguous()

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (output + (inputs[0].to(self.A_Ir.dtype) @ self.A_Ir) @ self.B_rO).to(output.dtype)


class LocalAnswerer:
    """Continues prompts with a loaded model. The model's generation_config is replaced and affects no answer."""

    def __init__(self, model: Any, tokenizer: Any, stops: Sequence[str], max_new: int, together: bool = False) -> None:
        self.model, self.tokenizer, self.max_new, self.together = model, tokenizer, max_new, together
        self.window: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.ends, self.stops = _ends(model, tokenizer, stops)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0]
        model.generation_config = GenerationConfig()

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt]) -> list[TurnResult]:
        """Return one answer per prompt, in order. A prompt that fills the context window fails without being run."""
        limits = [self._room(prompt) for prompt in prompts]
        runnable = [row for row, limit in enumerate(limits) if limit > 0]
        full = [row for row, limit in enumerate(limits) if limit <= 0]
        results = {row: prompt_too_long(len(prompts[row].ids), self.window) for row in full}
        if runnable:
            made = self._run([prompts[row] for row in runnable], [limits[row] for row in runnable])
            results |= dict(zip(runnable, made, strict=True))
        return [results[row] for row in range(len(prompts))]

    def _room(self, prompt: Prompt) -> int:
        return self.max_new if self.window is None else min(self.max_new, self.window - len(prompt.ids))

    def _run(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[TurnResult]:
        device = self.model.device
        ids_BP, mask_BP = _pad_left([prompt.ids for prompt in prompts], self.pad)
        longest = ids_BP.shape[1]
        sampler = SeededSampler(
            [prompt.seed for prompt in prompts],
            [prompt.temperature for prompt in prompts],
            longest,
            max_new=max(limits),
            end=self.ends[0],
            device=device,
            together=self.together,
        )
        settings = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max(limits), pad_token_id=self.pad, use_cache=True
        )
        out_BL = self.model.generate(
            input_ids=ids_BP.to(device), attention_mask=mask_BP.to(device), generation_config=settings,
            logits_processor=[sampler],
            stopping_criteria=[RowStops(self.tokenizer, self.ends, self.stops, limits, longest, device)],
        )  # fmt: skip
        rows = out_BL[:, longest:].tolist()
        broken = sampler.broken_at_B.tolist()
        return [self._result(*row) for row in zip(prompts, rows, limits, broken, strict=True)]

    def _result(self, prompt: Prompt, tokens: list[int], limit: int, broken_at: int) -> TurnResult:
        text, used, ended = cut_answer(tokens, self.tokenizer, self.ends, self.stops, limit)
        if 0 <= broken_at < used:
            return TurnResult(text, "failed", f"logits not finite at token {broken_at + 1}", len(prompt.ids), broken_at)
        if ended:
            return TurnResult(text, "ok", "", len(prompt.ids), used)
        filled = limit < self.max_new
        reason = f"cut at the end of the model's window of {self.window}" if filled else f"cut at {limit} tokens"
        return TurnResult(text, "truncated", reason, len(prompt.ids), used)


def _ends(model: Any, tokenizer: Any, stops: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return (end tokens, stop texts).

    End tokens are those of the tokenizer, those of the model, and stop texts that are special tokens.

    Raises:
        ValueError: there is no end token.
    """
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    own = model.generation_config.eos_token_id
    numbers = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *(special.get(s) for s in stops)]
    found = sorted({number for number in numbers if number is not None})
    if not found:
        raise ValueError("neither the tokenizer nor the model has an end token: no answer would ever end")
    return found, [stop for stop in stops if stop not in special]


def _pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), each (B, P) int64. The last column holds the last token of every prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BP = torch.full((len(prompts), longest), pad)
    mask_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        ids_BP[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BP[row, longest - len(prompt) :] = 1
    return ids_BP, mask_BP
