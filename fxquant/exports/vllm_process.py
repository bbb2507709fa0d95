"""A program: vLLM scores windows of tokens, asked through a pipe.

    python vllm_process.py

A line of JSON in, a line of JSON out. ``{"open": {...}}``, the arguments of vllm.LLM, is answered
by ``{"holds": tokens}``; ``{"score": rows}``, lists of ids, by ``{"losses": rows}`` in nats, of all
but each row's first; either by ``{"refused": words}`` where vLLM raises something. An engine that
is opened closes the one before. It is run by its path and imports nothing of fxquant: vLLM binds
threads, prints, and sets what torch computes in, all of which stay in this process.
"""

import gc
import json
import os
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM's own words, and those of what it calls, are no answers
    import vllm

    engine: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "open" in asked:
                if engine is not None:
                    engine = None
                    _clear()
                engine = vllm.LLM(**asked["open"])
                found = {"holds": engine.llm_engine.model_config.max_model_len}
            else:
                found = {"losses": _losses(vllm, engine, asked["score"])}
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _clear() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def _losses(vllm: Any, engine: Any, rows: list[list[int]]) -> list[list[float]]:
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = engine.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
    return [_of_row(each, row) for each, row in zip(found, rows, strict=True)]


def _of_row(found: Any, row: list[int]) -> list[float]:
    steps = zip(found.prompt_logprobs[1:], row[1:], strict=True)
    return [-step[token].logprob for step, token in steps]


if __name__ == "__main__":
    main()
