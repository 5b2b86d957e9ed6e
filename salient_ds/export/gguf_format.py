"""Write an adapter as one GGUF file, the format of llama.cpp, without llama.cpp.

llama.cpp (src/llama-adapter.cpp) multiplies the product of two tensors by adapter.lora.alpha / rows of the second one.
So every matrix keeps its own rank. Names of tensors are llama.cpp's own, which the ``gguf`` package knows. For some
families llama.cpp stores the rows of the query and key projections in another order, because its rotary embedding pairs
neighbours, where transformers pairs the two halves of a head.

Shape legend: I = in features, O = out features, H = heads, r = rank of a module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.export.atomic import atomic_directory
from salient_ds.export.base_files import local_folder, some
from salient_ds.export.card import write_card
from salient_ds.export.fold import AdapterFactors, LoraPair, fold
from salient_ds.export.forms import with_alpha
from salient_ds.export.merge import is_tied_head
from salient_ds.export.meta import ExportMeta, write_record
from salient_ds.export.peft_format import as_stored, check_factors

GGUF_FILE = "adapter.gguf"


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls a family of models, and whether it reorders query and key rows."""

    architecture: str
    reorders: bool = False


FAMILIES = {
    "llama": Family("llama", reorders=True),
    "mistral": Family("llama", reorders=True),
    "granite": Family("granite", reorders=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
    "olmo2": Family("olmo2"),
    "smollm3": Family("smollm3", reorders=True),
    "starcoder2": Family("starcoder2"),
}
"""model_type of config.json -> family. Each of them is compared with llama.cpp (tests/clients/test_clients.py)."""


def write_gguf(
    target: Path,
    factors: Sequence[AdapterFactors],
    meta: ExportMeta,
    base: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``adapter.gguf``, ``salient_ds.json`` and a card into the folder ``target``, all or nothing.

    Args:
        base: checkpoint directory or cached hub name. Its config.json says which family it is of.
        dtype: float32, float16 or bfloat16.
        trained: parameters trained in full, which the format cannot hold.

    Raises:
        ValueError: llama.cpp cannot load such an adapter; the message says why, and the remedy.
        ImportError: the ``gguf`` package is missing.
        OSError: the disk is full; ``target`` is unchanged.
    """
    gguf = _library()
    check_factors(factors)
    if target.suffix == ".gguf":
        raise ValueError(f"{target} names a file: give a folder, {GGUF_FILE} is written into it")
    if trained:
        raise ValueError(
            f"{some(sorted(trained))} were trained in full, and a GGUF adapter holds factors only: export as merged, "
            "and convert the model with convert_hf_to_gguf.py of llama.cpp"
        )
    config = _text_config(local_folder(base, meta.revision_of(base)))
    family = _family(config, base)
    alpha = max(item.rank for item in factors)
    pairs = [with_alpha(pair, alpha) for pair in map(fold, factors) if pair is not None]
    names = _names(gguf, pairs, family, config)
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        B_Or = _reordered(pair, config) if family.reorders else pair.B_Or
        tensors[f"{names[pair.name]}.lora_a"] = as_stored(pair.A_rI, dtype, pair.name, "A")
        tensors[f"{names[pair.name]}.lora_b"] = as_stored(B_Or, dtype, pair.name, "B")
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    base_name = meta.base_name(base)
    with atomic_directory(target, overwrite, size, protected=(base, meta.source_run)) as folder:
        _write(gguf, folder / GGUF_FILE, family, alpha, tensors, dtype)
        write_record(folder, factors, meta, "gguf", base_name, str(dtype).removeprefix("torch."))
        write_card(folder, meta, "gguf", base_name, {item.name: item.rank for item in factors}, alpha)
    return target


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("the form gguf needs the gguf package: pip install 'salient-ds[gguf]'") from error
    return gguf


def _text_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(folder).get_text_config().to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no config.json that transformers can read: {error}") from error
    return found


def _family(config: Mapping[str, Any], base: Path | str) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{str(base)!r} is of family {kind!r}, and adapters as GGUF are tested for {', '.join(sorted(FAMILIES))}: "
            "export as padded, and convert it with convert_lora_to_gguf.py of llama.cpp"
        )
    return FAMILIES[kind]


def _names(gguf: Any, pairs: Sequence[LoraPair], family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Module path -> name of the tensor in llama.cpp."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[family.architecture], config["num_hidden_layers"])
    found = {pair.name: table.get_name(pair.name) for pair in pairs}
    lost = [name for name, theirs in found.items() if theirs is None or is_tied_head(name, config)]
    if lost:
        raise ValueError(
            f"llama.cpp has no matrix of its own for {some(lost)}: export as merged, or leave it out of "
            "adapter.target_modules"
        )
    return {name: f"{theirs}.weight" for name, theirs in found.items()}


def _reordered(pair: LoraPair, config: Mapping[str, Any]) -> Tensor:
    """B (O, r) with its rows in llama.cpp's order: of every head, 0, half, 1, half + 1, and so on."""
    leaf = pair.name.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return pair.B_Or
    heads = config["num_attention_heads"]
    if leaf == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    B_H2hr = pair.B_Or.reshape(heads, 2, -1, pair.rank)
    return B_H2hr.transpose(1, 2).reshape(pair.B_Or.shape)


def _write(
    gguf: Any, path: Path, family: Family, alpha: int, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    kinds = {
        torch.float32: gguf.LlamaFileType.ALL_F32,
        torch.float16: gguf.LlamaFileType.MOSTLY_F16,
        torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    }
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_file_type(kinds[dtype])
    for name, value in tensors.items():
        if dtype == torch.bfloat16:  # numpy has no such type: bytes, with the shape of the numbers
            raw = value.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
