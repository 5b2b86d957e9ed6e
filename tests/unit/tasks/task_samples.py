"""Tokenizers of three families, made on the spot, and a row in the schema of SQuAD."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ELBE = (
    "The Elbe rises in the Giant Mountains of the Czech Republic. It flows through Dresden and Hamburg to the North "
    "Sea. The river is about 1,094 kilometres long, and ships use most of it. Its “old” bridges are of stone."
)
CORPUS = [ELBE, "Where does the river rise? How long is it? Who built the bridges? summarize: a b c d e"] * 3


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] a [SEP] b [SEP], with token types."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def byte_level() -> PreTrainedTokenizerFast:
    """As RoBERTa's and BART's: <s> a </s></s> b </s>, spaces inside of tokens, no token types."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def end_token() -> PreTrainedTokenizerFast:
    """As T5's: a </s>, and a pair a </s> b </s>; no token at the start."""
    tokenizer = Tokenizer(
        models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], unk_id=2, byte_fallback=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def question(id: str, text: str, *answers: str) -> dict[str, Any]:
    """A row of SQuAD about the Elbe."""
    found = {"text": list(answers), "answer_start": [ELBE.index(answer) for answer in answers]}
    return {"id": id, "title": "Elbe", "context": ELBE, "question": text, "answers": found}


TOKENIZERS = {"wordpiece": wordpiece(), "byte_level": byte_level(), "end_token": end_token()}
