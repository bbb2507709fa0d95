"""Small datasets written as the hub stores them, and a tokenizer of one token a character."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"
BOS = "<s>"


def character_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Id 0 is <s>, put at the head of each text if ``bos``; id 1 + i is ALPHABET[i]."""
    vocabulary = {BOS: 0, **{letter: 1 + i for i, letter in enumerate(ALPHABET)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=BOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, unk_token=BOS)


def ids_of(text: str, bos: bool = True) -> list[int]:
    """What character_tokenizer gives for a text, without it."""
    return [0] * bos + [1 + ALPHABET.index(letter) for letter in text]


def write_parquet(path: Path, column: str, values: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: list(values)}), path)


def write_wikitext(data: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Salesforce/wikitext: a card that names the configuration's files, parquet files."""
    root = data / "Salesforce" / "wikitext"
    card = ["---", "configs:", "- config_name: wikitext-2-raw-v1", "  data_files:"]
    for split, texts in splits.items():
        card += [f"  - split: {split}", f"    path: wikitext-2-raw-v1/{split}-*"]
        name = f"{split}-00000-of-00001.parquet"
        write_parquet(root / "wikitext-2-raw-v1" / name, "text", texts)
    (root / "README.md").write_text("\n".join([*card, "---", ""]))


def write_c4(data: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """allenai/c4: one gzipped JSON-lines file of each split."""
    shards = {"train": "of-01024", "validation": "of-00008"}
    folder = data / "allenai" / "c4" / "en"
    folder.mkdir(parents=True)
    for split, texts in splits.items():
        with gzip.open(folder / f"c4-{split}.00000-{shards[split]}.json.gz", "wt") as file:
            for text in texts:
                row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"}
                file.write(json.dumps(row) + "\n")


def write_ptb(data: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """ptb-text-only/ptb_text_only at refs/convert/parquet."""
    root = data / "ptb-text-only" / "ptb_text_only" / "penn_treebank"
    for split, texts in splits.items():
        write_parquet(root / split / "0000.parquet", "sentence", texts)
