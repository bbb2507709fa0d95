"""Train the small OPT of the tests: from the project's root, `python -m tests.small_opt.train`.

A real `OPTForCausalLM` (pre-LayerNorm, ReLU, biases, tied head) and a byte-level BPE tokenizer,
both trained on the prose that CPython ships, so that the tests have a model that has learned
something and needs no download. The architecture is OPT's (Zhang et al., 2022, arXiv:2205.01068),
the recipe is the usual one for a small corpus: AdamW, cosine schedule, dropout.
"""

import argparse
import hashlib
import json
import math
import platform
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from fxquant.evaluation.builtin_text import builtin_text

VOCABULARY = 1024
WINDOW = 256
BATCH = 8
PEAK_LEARNING_RATE = 2e-3
WARMUP = 50
DROPOUT = 0.25  # the corpus is seen twenty times
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>")  # OPT's ids: 0, 1 (padding), 2 (start and end of a text)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens; it adds no special tokens to a text."""
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def build_model() -> OPTForCausalLM:
    """The untrained model, about one million parameters, weights drawn from torch's global seed."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=128,
        dropout=DROPOUT,
    )
    return OPTForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """The text's token ids, LongTensor [tokens]."""
    return torch.tensor(tokenizer(text)["input_ids"])


def train(model: OPTForCausalLM, stream: Tensor, steps: int, seed: int) -> float:
    """Train in place on random windows of `stream`; the mean loss (nats) of the last 50 steps.

    A window starts at a random position id, so that every position of the model is trained though
    windows are shorter than `max_position_embeddings`.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, min(WARMUP, steps), steps)
    offsets = model.config.max_position_embeddings - WINDOW + 1
    within = torch.arange(WINDOW)
    losses: list[float] = []

    model.train()
    bar = trange(steps, desc="training", disable=None)
    for _ in bar:
        starts = torch.randint(len(stream) - WINDOW, (BATCH, 1), generator=generator)
        ids = stream[starts + within]
        position_ids = torch.randint(offsets, (BATCH, 1), generator=generator) + within
        loss = model(input_ids=ids, position_ids=position_ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    last = losses[-50:]
    return sum(last) / len(last)


@torch.no_grad()
def evaluate(model: OPTForCausalLM, stream: Tensor, window: int = WINDOW) -> float:
    """Mean loss (nats a token) over the stream's non-overlapping windows; the tail is dropped."""
    windows = stream[: len(stream) // window * window].view(-1, window)
    logits = torch.cat([model(input_ids=batch).logits for batch in windows.split(16)])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()


def unigram_entropy(stream: Tensor) -> float:
    """Entropy (nats a token) of the token frequencies of `stream`: the cost of guessing unread.

    The frequencies are the stream's own, which no unigram model of other text can beat.
    """
    frequencies = torch.bincount(stream).double() / len(stream)
    return float(torch.special.entr(frequencies).sum())


def sha256(text: str) -> str:
    """Hexadecimal SHA-256 of the text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Train, save as fp16, and record how it was made beside the weights."""
    parser = argparse.ArgumentParser(description="Train the small OPT of the tests.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(2)  # sums depend on the number of threads
    torch.use_deterministic_algorithms(True)
    texts = {"train": builtin_text("train"), "evaluation": builtin_text("evaluation")}
    tokenizer = train_tokenizer(texts["train"])
    streams = {split: token_stream(tokenizer, text) for split, text in texts.items()}
    model = build_model()
    train_loss = train(model, streams["train"], options.steps, options.seed)

    model.config.dropout = 0.0
    model.half().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    stored = OPTForCausalLM.from_pretrained(options.output, dtype=torch.float32).eval()
    record = {
        "steps": options.steps,
        "seed": options.seed,
        "batch": BATCH,
        "window": WINDOW,
        "peak_learning_rate": PEAK_LEARNING_RATE,
        "dropout": DROPOUT,
        "optimizer": "AdamW, betas 0.9 and 0.98, weight decay 0.1, gradient norm 1, cosine",
        "parameters": sum(parameter.numel() for parameter in stored.parameters()),
        "train_tokens": len(streams["train"]),
        "evaluation_tokens": len(streams["evaluation"]),
        "train_sha256": sha256(texts["train"]),
        "evaluation_sha256": sha256(texts["evaluation"]),
        "train_loss_last_50_steps": round(train_loss, 4),
        "evaluation_loss": round(evaluate(stored, streams["evaluation"]), 4),
        "evaluation_loss_window_512": round(evaluate(stored, streams["evaluation"], 512), 4),
        "evaluation_unigram_entropy": round(unigram_entropy(streams["evaluation"]), 4),
        "uniform_entropy": round(math.log(VOCABULARY), 4),
        "text": "CPython's pydoc_data.topics, PSF licence",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (options.output / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
