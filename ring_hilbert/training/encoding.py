# SPDX-License-Identifier: Apache-2.0
"""Batches of texts to columns of numbers, in order: in this process, or on all cores if that takes long."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ring_hilbert.training.documents import content_hash
from ring_hilbert.training.reading import Batch
from ring_hilbert.training.tokens import document_encoder

ALONE = 2.0  # seconds that a process tokenises alone before it starts others, unless there is much to do:
LONG = 2**25  # bytes of files, which take one core ten seconds


class Encoded(NamedTuple):
    """The columns of a batch, except its files, and the largest id."""

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    largest_id: int


Means = tuple[PreTrainedTokenizerBase, bool | None, str]  # tokenizer, `data.bos`, dtype of the tokens
Encode = Callable[[list[str]], Encoded]


def encoded(
    batches: Iterator[Batch], means: Means, workers: int, size: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Every batch with its columns, in order: computed here at first and, if that takes long, by `workers` other processes.

    `size`: bytes of the files.
    """
    begin, encode, starting = time.monotonic() - (ALONE if size >= LONG else 0.0), _encoder(*means), None
    pool: ProcessPoolExecutor | None = None
    with ExitStack() as stack:
        for batch in batches:
            yield batch, encode(batch.texts)
            if starting is not None:
                if not starting.is_alive():
                    break
            elif workers > 1 and time.monotonic() - begin > ALONE:
                pool = stack.enter_context(_pool(workers, means))
                stack.callback(pool.shutdown, cancel_futures=True)
                starting = _start(pool)
        else:
            return
        assert pool is not None
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_there, batch.texts)))
            while len(waiting) > 4 * workers or (waiting and waiting[0][1].done()):
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _pool(workers: int, means: Means) -> ProcessPoolExecutor:
    """Forked, if possible, from a thread-free process that has done the imports, which take seconds, once."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, _set_up, means)


def _start(pool: ProcessPoolExecutor) -> threading.Thread:
    """A thread that ends once the first process is ready for work, or has failed."""
    thread = threading.Thread(target=lambda: pool.submit(int).exception(), daemon=True)
    thread.start()
    return thread


_encode_there_by: Encode | None = None  # in a process of a pool


def _set_up(*means: Any) -> None:
    global _encode_there_by
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the cores
    _encode_there_by = _encoder(*means)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the parent: a pool process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_there(texts: list[str]) -> Encoded:
    assert _encode_there_by is not None
    return _encode_there_by(texts)


def _encoder(tokenizer: PreTrainedTokenizerBase, bos: bool | None, dtype: str) -> Encode:
    encode = document_encoder(tokenizer, bos)

    def columns(texts: list[str]) -> Encoded:
        ids = encode(texts)
        tokens = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
        largest = int(tokens.max(initial=-1))
        if largest > np.iinfo(dtype).max:
            raise ValueError(f"the tokenizer gives the id {largest}, which is beyond its own vocabulary")
        lengths = np.array([len(row) for row in ids], dtype="<u4")
        hashes = np.array([content_hash(row) for row in ids], dtype="<u8")
        return Encoded(tokens.astype(dtype), lengths, hashes, largest)

    return columns
