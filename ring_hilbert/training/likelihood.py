# SPDX-License-Identifier: Apache-2.0
"""lm-eval's likelihood tasks (multiple choice, perplexity) on a `Scorer`. Nothing is generated: other tasks are refused."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ring_hilbert.training.score import Scorer
from ring_hilbert.training.tokens import document_encoder, eos_id

PER_BATCH = 2**14  # tokens that are scored at once, padding included


def evaluate_tasks(
    scorer: Scorer, tokenizer: PreTrainedTokenizerBase, tasks: list[str], include_path: str | None, limit: int | None
) -> dict[str, Any]:
    """`{"tasks": {task: {metric: value}}}` of lm-eval. All ranks call it and get the same.

    Args:
        scorer: the model.
        tokenizer: its own.
        tasks: names that lm-eval knows.
        include_path: a folder with tasks of one's own, None for none.
        limit: examples of a task, None for all.

    Raises:
        ValueError: lm-eval is not installed, knows no such task, or the task wants text to be generated.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-eval, which is not installed: pip install 'ring_hilbert[lm-eval]'")
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]  # an extra
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  # an extra

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {unknown}; `lm_eval ls tasks` lists its own, --include-path adds yours"
        )
    # The interface is that of one process, and every rank is one of it: they meet in the scorer.
    model = adapter()(Likelihood(scorer, tokenizer))
    found = simple_evaluate(model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False)
    assert found is not None
    metrics = {
        task: {name.removesuffix(",none"): value for name, value in values.items() if isinstance(value, float)}
        for task, values in found["results"].items()
    }
    return {"tasks": metrics}


class Likelihood:
    """Log-likelihoods of continuations, many at a time."""

    def __init__(self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase) -> None:
        self.scorer = scorer
        self._encode = document_encoder(tokenizer, bos=False)
        bos = tokenizer.bos_token_id
        self._before = bos if isinstance(bos, int) else eos_id(tokenizer)

    def continuations(self, requests: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the sum of log-probabilities, and whether all its tokens were the first choice."""
        pairs = [(self._ids(context), self._ids(context + continuation)) for context, continuation in requests]
        # A tokenizer may join the end of the one and the start of the other into one token, which is then scored as well.
        starts = [
            next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), len(pair[0])) for pair in pairs
        ]
        return self._scored([whole for _, whole in pairs], starts)

    def whole(self, texts: list[str]) -> list[float]:
        """The sum of log-probabilities of whole texts; those longer than the model's positions in windows that do not overlap."""
        windows, of = list[np.ndarray](), list[int]()
        for number, text in enumerate(texts):
            ids, most = self._ids(text)[1:], (self.scorer.longest or 2**20) - 1
            for first in range(0, len(ids), most):
                before = ids[first - 1] if first else self._before
                windows.append(np.concatenate([[before], ids[first : first + most]]))
                of.append(number)
        sums = [0.0] * len(texts)
        for number, (log, _) in zip(of, self._scored(windows, [1] * len(windows)), strict=True):
            sums[number] += log
        return sums

    def _ids(self, text: str) -> np.ndarray:
        """Behind the token that a text begins with."""
        (ids,) = self._encode([text])
        return np.concatenate([[self._before], ids[:-1]]).astype(np.int64)

    def _scored(self, sequences: list[np.ndarray], starts: list[int]) -> list[tuple[float, bool]]:
        """Of every sequence the tokens from `start` on. Those longer than the model's positions lose what is in front."""
        longest = self.scorer.longest
        found: list[tuple[float, bool]] = [(0.0, True)] * len(sequences)
        waiting = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
        while waiting:
            length = min(len(sequences[waiting[0]]), longest or 2**62)
            group = [waiting.pop(0) for _ in range(min(len(waiting), max(1, PER_BATCH // length)))]
            ids, documents = np.zeros((len(group), length), np.int64), np.full((len(group), length), -1, np.int64)
            for row, number in enumerate(group):
                kept = sequences[number][-length:]
                ids[row, : len(kept)], documents[row, : len(kept)] = kept, 0
            losses, hits = self.scorer(ids, documents)
            for row, number in enumerate(group):
                whole = len(sequences[number])
                cut = max(0, whole - length)
                if starts[number] - cut < 1:
                    raise ValueError(
                        f"a continuation of {whole - starts[number]} tokens does not fit into the model's {longest} positions"
                    )
                own = slice(starts[number] - cut - 1, whole - cut - 1)
                found[number] = -float(losses[row, own].sum()), bool(hits[row, own].all())
        return found


@functools.cache
def adapter() -> type:
    """lm-eval's model class around a `Likelihood`; made here, as lm-eval need not be installed."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]  # an extra

    class RingHilbertLM(LM):
        """See `Likelihood`."""

        def __init__(self, likelihood: Likelihood) -> None:
            super().__init__()
            self._likelihood = likelihood

        def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
            """Of continuations."""
            return self._likelihood.continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
            """Of whole texts."""
            return self._likelihood.whole([request.args[0] for request in requests])

        def generate_until(self, requests: Iterable[Any]) -> list[str]:
            """Refused."""
            del requests
            raise ValueError("the task wants text to be generated; only likelihood tasks can be scored")

    return RingHilbertLM
