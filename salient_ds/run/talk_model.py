"""Loads a run, an adapter or a model to talk to, with the template of its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salient_ds.adapters.ranked_linear import RankedLinear
from salient_ds.config.run import ModelConfig
from salient_ds.data.conversation import Conversation
from salient_ds.data.template_base import Template
from salient_ds.data.templates import get_template
from salient_ds.models.loading import load_tokenizer
from salient_ds.own_files import read_settings
from salient_ds.run.applying import add_adapter, add_checkpoint
from salient_ds.run.export import newest_checkpoint
from salient_ds.run.places import missing_folder, not_on_the_hub, unreachable
from salient_ds.run.targets import ADAPTER_FILES, adapter_facts, is_adapter

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Speech:
    """Where a model to talk to comes from."""

    model: ModelConfig
    adapter: Path | None
    checkpoint: Path | None
    template: str | None
    """Name of the prompt template of training, if anything says which."""
    shortcut_norm: str | None = None


def speech_of(place: str, base: str | None = None) -> Speech:
    """Find out what ``place`` is.

    Raises:
        ValueError: there is no such folder, it is none of these, or it was trained for a task with a metric.
        CheckpointError: it is a run without a whole checkpoint.
    """
    problem = missing_folder(place)
    if problem is not None:
        raise ValueError(f"{problem}: give a run, an adapter, a model directory or a model's hub name")
    folder = Path(place).expanduser()
    if (folder / "run.yaml").is_file():
        return _of_run(folder, base)
    facts = adapter_facts(folder) if folder.is_dir() else {}
    if facts.get("task"):
        raise _not_for_talking(place)
    template = (facts.get("template") or {}).get("name")
    if folder.is_dir() and is_adapter(folder):
        name = base or facts.get("base_model_name_or_path")
        if not name:
            raise ValueError(f"{place} does not name its base model: give --base")
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise ValueError(f"the base model of {place} is no longer at {name}: give --base")
        return Speech(ModelConfig(path=name, revision=None if base else facts.get("revision")), folder, None, template)
    if folder.is_dir() and not (folder / "config.json").is_file():
        kinds = f"no run (run.yaml), adapter ({ADAPTER_FILES[0]}) or model (config.json)"
        raise ValueError(f"{place} is {kinds}: give one of them")
    return Speech(ModelConfig(path=place), None, None, template)


def _of_run(folder: Path, base: str | None) -> Speech:
    config = read_settings(folder / "run.yaml")
    if config["data"].get("task") is not None or config["model"]["task"] != "causal-lm":
        raise _not_for_talking(str(folder))
    known = {
        key: value for key, value in config["model"].items() if key in ("tokenizer", "revision", "trust_remote_code")
    }
    if base is not None:
        known["revision"] = None
    model = ModelConfig(path=base or config["model"]["path"], **known)
    template = config["data"].get("template")
    norm = (config["adapter"].get("shortcuts") or {}).get("norm_after_shortcut")
    if is_adapter(folder / "adapter"):
        return Speech(model, folder / "adapter", None, template, norm)
    return Speech(model, None, newest_checkpoint(folder), template, norm)


def _not_for_talking(place: str) -> ValueError:
    return ValueError(f"{place} was trained for a task with a metric, not to talk: use salient-ds evaluate {place}")


@dataclass
class Talker:
    """A loaded model with its tokenizer and template."""

    model: Any
    tokenizer: Any
    template: Template
    adapted: list[tuple[nn.Module, str, RankedLinear]]
    """Parent, name and wrapper of every adapted layer."""

    def tokens(self, conversation: Conversation) -> list[int]:
        """The prompt that continues a conversation, as in training."""
        text = self.template.prompt(conversation, self.tokenizer)
        return list(self.tokenizer(text, add_special_tokens=self.template.adds_bos).input_ids)

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return self.template._ends(self.tokenizer)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model for a while."""
        for parent, name, wrapper in self.adapted:
            setattr(parent, name, wrapper.base)
        try:
            with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext():
                yield
        finally:
            for parent, name, wrapper in self.adapted:
                setattr(parent, name, wrapper)


def load_talker(speech: Speech, place: str, template: str | None, precision: str | None, compare: bool) -> Talker:
    """Load model, adapter and tokenizer, on the GPU if there is one.

    Args:
        template: name of the template, if nothing says which.
        precision: fp32, bf16 or fp16 (default: bf16 on GPUs, fp32 on CPUs).
        compare: whether the base model will be asked too.

    Raises:
        ValueError: something cannot be loaded, the template is unknown, or ``template`` is not that of training.
    """
    import transformers

    gpu = torch.cuda.is_available()
    dtype = PRECISIONS[precision or ("bf16" if gpu else "fp32")]
    chosen = _template(speech, template, place)
    problem = unreachable(speech.model.path, speech.model.revision)
    if problem is not None:
        raise ValueError(problem)
    try:
        tokenizer = load_tokenizer(speech.model)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            speech.model.path,
            revision=speech.model.revision,
            trust_remote_code=speech.model.trust_remote_code,
            dtype=dtype,
        )
    except OSError as error:
        folder = Path(speech.model.path).is_dir()
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{speech.model.path} cannot be loaded: {why}" if folder else not_on_the_hub(speech.model.path, why)
        ) from error
    if chosen is None:
        chosen = _own_template(tokenizer, place)
    if speech.adapter is not None:
        if compare and (speech.adapter / ADAPTER_FILES[1]).is_file():
            raise ValueError(f"{place} has shortcuts, which cannot be taken out again: leave --compare out")
        model = add_adapter(model, speech.adapter)
    elif speech.checkpoint is not None:
        add_checkpoint(model, speech.checkpoint, speech.shortcut_norm)
    adapted = [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], module)
        for path, module in model.named_modules()
        if isinstance(module, RankedLinear)
    ]
    device = torch.device("cuda" if gpu else "cpu")
    return Talker(model.to(device).eval(), tokenizer, get_template(chosen), adapted)


def _template(speech: Speech, wanted: str | None, place: str) -> str | None:
    if wanted is not None and speech.template is not None and wanted != speech.template:
        raise ValueError(f"{place} was trained with template {speech.template!r}, not {wanted!r}: leave --template out")
    name = wanted or speech.template
    if name is not None:
        get_template(name)
    return name


def _own_template(tokenizer: Any, place: str) -> str:
    if tokenizer.chat_template:
        return "tokenizer"
    raise ValueError(
        f"nothing says which prompt template {place} was trained with, and its tokenizer has no chat template: give "
        "--template (alpaca, vicuna_v1.1, llama-2, chatml or fastchat:NAME)"
    )
