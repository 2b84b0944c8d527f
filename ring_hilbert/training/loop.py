# SPDX-License-Identifier: Apache-2.0
"""Pretraining from a configuration: check everything, build, resume, train, evaluate, export."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from transformers import PretrainedConfig

from ring_hilbert.integrations.transformers_config import order_of
from ring_hilbert.training.batches import Batches
from ring_hilbert.training.checkpoint import EXPORT, Checkpoints, Progress, finished
from ring_hilbert.training.config import RunConfig
from ring_hilbert.training.data import PackedDataset, open_dataset
from ring_hilbert.training.disks import once_per_disk
from ring_hilbert.training.engine import Engine, check_engine, make_engine
from ring_hilbert.training.evaluate import Evaluation, count_tokens, evaluate
from ring_hilbert.training.export import export_model
from ring_hilbert.training.fitting import Fitted, out_of_memory, planned, settled
from ring_hilbert.training.hosts import rank_device
from ring_hilbert.training.metrics import Metrics, check_log, peak_memory, read_metrics
from ring_hilbert.training.model import build_skeleton, check_model, model_config, vocab_size
from ring_hilbert.training.packing import describe
from ring_hilbert.training.prepare import cache_folder
from ring_hilbert.training.prepared import with_prepared
from ring_hilbert.training.probe import probe
from ring_hilbert.training.random_state import seed_rank
from ring_hilbert.training.readback import read_later
from ring_hilbert.training.schedule import learning_rate, with_decay_steps
from ring_hilbert.training.signals import StopSignals
from ring_hilbert.training.speed import Watch, multiplying_parameters, peak_flops, step_flops
from ring_hilbert.training.step import accumulate
from ring_hilbert.training.stragglers import Stopwatch, Stragglers, collected_once
from ring_hilbert.training.weights import decoder_layers
from ring_hilbert.training.world import RankError, World, open_world, process_group, release_memory

HANGS = "hangs"  # the folder below log.dir for the traces of a hang


@dataclass(frozen=True)
class Summary:
    """How a run ended; losses are None without data.eval, and `model`, the exported folder, is None if told to stop."""

    progress: Progress
    eval_loss: float | None
    unigram_loss: float | None
    model: Path | None


def pretrain(config: RunConfig) -> Summary:
    """Train until `train.steps`, resuming from the newest checkpoint in `checkpoint.dir` if there is one. All ranks call it.

    Nothing is written before the whole configuration, the data and the checkpoint have been validated.

    Raises:
        ValueError: if the configuration cannot be run, or does not fit the devices; on every rank, naming the rank that found it.
            If a device was out of memory: on that rank.
        FloatingPointError: if the gradient was not finite in optim.max_skipped steps in a row.
    """
    check_engine(config)
    check_log(config)
    config = with_decay_steps(config)
    with open_world(config.parallel, config.timeouts, Path(config.log.dir) / HANGS) as world:
        with world.together():
            config = config.model_copy(update={"data": with_prepared(config.data)})
            hf_config = model_config(config)
            check_model(hf_config)
        with world.phase("data", "preparing data"):
            once_per_disk(world, cache_folder(), lambda: _open_data(config, hf_config))
        with world.together():
            train_set, eval_set = _open_data(config, hf_config)
        documents = train_set.documents | ({} if eval_set is None else eval_set.documents)
        with closing(Checkpoints(config, world, documents, hf_config)) as checkpoints:
            found = checkpoints.latest()
            initial = checkpoints.initial() if found is None else None
            release_memory(world.device)  # of the previous stage
            with planned(config, world) as fitted:
                if config.train.probe and world.size > 1:
                    probe(settled(config), hf_config, world)
                    release_memory(world.device)
                fit = world.from_main(fitted)
            if fit is not None and fit.refusal:
                raise RankError(fit.refusal)
            plan = _said(config, fit)
            config = settled(config) if fit is None else fit.settle(config)
            to_load = found is not None or initial is not None
            with (
                out_of_memory(config, fit),
                closing(make_engine(config, hf_config, world, to_load=to_load)) as engine,
            ):
                seed_rank(config, world, 0)
                run = Run(config, world, engine, checkpoints, train_set, eval_set, hf_config)
                if found is not None:
                    run.progress = checkpoints.load(found, engine)
                elif initial is not None:
                    checkpoints.start_from(initial, engine)
                return run.go(None if found is None else run.progress.step, plan)


def pretrain_stages(stages: dict[str, RunConfig]) -> Summary | None:
    """`pretrain` each stage in turn, skipping finished ones; stops after one that was told to stop.

    Returns:
        How the last one ended, None if all had been finished already.
    """
    summary = None
    for config in stages.values():
        check_engine(config)
    longest = max((config.timeouts for config in stages.values()), key=lambda timeouts: timeouts.longest)
    with process_group(rank_device(), longest):  # one for all
        left = [[name for name, config in stages.items() if not (name and finished(config))]]
        dist.broadcast_object_list(left, src=0)  # hosts may see different files
        for name in left[0]:
            summary = pretrain(stages[name])
            if summary.model is None:
                break
    return summary


def _said(config: RunConfig, fit: Fitted | None) -> str | None:
    if fit is not None:
        return fit.taken(config)
    return "there is none; it could not be made, or took too long" if config.log.memory_plan else None


def _open_data(config: RunConfig, hf_config: PretrainedConfig) -> tuple[PackedDataset, PackedDataset | None]:
    """The training and held-out sequences, the latter None without data.eval."""
    splits: list[Literal["train", "eval"]] = ["train"] if config.data.eval is None else ["train", "eval"]
    vocab = vocab_size(hf_config)
    opened = [open_dataset(config.data, split, vocab_size=vocab, seed=config.train.seed) for split in splits]
    return opened[0], opened[1] if len(opened) > 1 else None


class Run:
    """One call of `pretrain`, with everything built."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        engine: Engine,
        checkpoints: Checkpoints,
        train_set: PackedDataset,
        eval_set: PackedDataset | None,
        hf_config: PretrainedConfig,
    ) -> None:
        self.config = config
        self.world = world
        self.engine = engine
        self.checkpoints = checkpoints
        self.hf_config = hf_config
        self.vocab = vocab_size(hf_config)
        self.train_set, self.eval_set = train_set, eval_set
        order = order_of(hf_config)
        self.train_batches = Batches(train_set, config, order, world)
        self.eval_batches = None if eval_set is None else Batches(eval_set, config, order, world)
        self.progress = Progress()
        self.skipped_in_a_row = 0
        self.computing = 0.0  # seconds of this rank in the last step's forward and backward; on a GPU, to start them
        self.stopwatch = Stopwatch(decoder_layers(engine.model))
        self.stragglers = Stragglers(config.log)
        self.peak_flops = peak_flops(config, world)
        self.flops = 0.0
        if self.peak_flops is not None:
            self.flops = step_flops(config, hf_config, multiplying_parameters(build_skeleton(config, hf_config)))

    def go(self, resumed_from: int | None, plan: str | None = None) -> Summary:
        """Train the remaining steps, then evaluate, export and plot; or leave after a checkpoint when told to stop.

        `plan`: the memory plan to report.
        """
        config = self.config
        self.world.from_main(self._make_folders)
        with StopSignals() as signals, Metrics(config, self.world, resumed_from) as metrics, collected_once() as settle:
            for dataset in [self.train_set] + ([] if self.eval_set is None else [self.eval_set]):
                for name, packing in dataset.packings.items():
                    metrics.say(f"{name}: {packing.documents.summary}; {describe(packing)}")
            if resumed_from is not None:
                metrics.say(f"resumed from step {resumed_from} in {config.checkpoint.dir}")
            for note in self.checkpoints.notes:
                metrics.say(note)
            metrics.say(f"train.fused: {self.engine.model.fused}")
            if plan is not None:
                metrics.say(f"memory plan: {plan}")
            self.engine.prepare_to_save()
            watch, first = Watch(config, self.world), self.progress.step + 1
            while self.progress.step < config.train.steps:
                with self.world.phase("step", "a step"):
                    stop = self._timed_step(metrics, watch, signals)
                step, last = self.progress.step, self.progress.step == config.train.steps
                if step == first:
                    self._say_peak(metrics)
                    settle()
                if config.data.eval is not None and step % config.data.eval.every == 0 and not last and not stop:
                    self._evaluate(metrics)
                if step % config.checkpoint.every == 0 or last or stop:
                    with self.world.phase("save", "saving a checkpoint"):
                        self.checkpoints.save(self.engine, self.progress)
                        if last or stop:
                            self.checkpoints.wait()
                if stop and not last:
                    metrics.close_bar()
                    metrics.say(
                        f"{signals.received or 'told to stop'}: stopped after step {step}; the same command resumes from there"
                    )
                    return Summary(self.progress, None, None, None)
            metrics.close_bar()
            self._say_peak(metrics)
            return self._finish(metrics)

    def _say_peak(self, metrics: Metrics) -> None:
        """Report the measured memory; on the CPU including that of Python and its libraries."""
        peak = self.world.gather(peak_memory(self.world.device)).max().item()
        metrics.say(f"peak memory after step {self.progress.step}: {peak / 2**30:.2f} GiB on the rank with most")

    def train_step(self) -> tuple[float, float, float]:
        """One optimizer step: global mean loss, global gradient norm before clipping, learning rate used."""
        config, progress, whereabouts = self.config, self.progress, self.world.whereabouts
        whereabouts.step = progress.step + 1
        whereabouts.enter("reading a batch")
        stop = progress.sequences + config.sequences_per_step
        micro_batches = self.train_batches.of(progress.sequences, stop)
        start = time.perf_counter()
        found = read_later(accumulate(self.engine, micro_batches, self.world))
        self.computing = time.perf_counter() - start
        if progress.step + 1 < config.train.steps:
            whereabouts.enter("reading the next step's batch")
            self.train_batches.read_ahead(stop, stop + config.sequences_per_step)
        rate = learning_rate(config, progress.step)
        whereabouts.enter("optimizer")
        norm = self.engine.step(rate)
        loss, tokens = found()
        self._count_skipped(norm)
        self.progress = Progress(progress.step + 1, stop, progress.tokens + int(tokens), self.progress.skipped)
        return loss, norm, rate

    def _count_skipped(self, norm: float) -> None:
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.progress = replace(self.progress, skipped=self.progress.skipped + 1)
        if self.skipped_in_a_row >= max(1, self.config.optim.max_skipped):
            raise FloatingPointError(
                f"the global gradient norm is {norm}, not finite for {self.skipped_in_a_row} steps in a row; none of them "
                "updated the model; a lower optim.lr or a longer warm-up may help"
            )

    def _make_folders(self) -> None:
        for folder in (self.config.checkpoint.dir, self.config.log.dir):
            Path(folder).mkdir(parents=True, exist_ok=True)

    def _timed_step(self, metrics: Metrics, watch: Watch, signals: StopSignals) -> bool:
        """Run a step and record its metrics; returns whether any rank was told to stop."""
        config, start = self.config, time.perf_counter()
        with watch.step(self.progress.step + 1):
            loss, norm, rate = self.train_step()
            took = time.perf_counter() - start  # excludes the profiler's work afterwards
        told = signals.received is not None, self.checkpoints.failed
        ranks = self.world.gather(took, self.computing, *told, self.stopwatch.read())
        seconds = ranks[:, 0].max().item()
        speed = config.train.global_batch_tokens / seconds
        values = {
            "loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens": self.progress.tokens,
            "skipped": self.progress.skipped, "tokens_per_second": speed, "seconds": seconds,
            "seconds_spread": (ranks[:, 1].max() - ranks[:, 1].min()).item(), "memory_bytes": peak_memory(self.world.device),
        }  # fmt: skip
        if self.peak_flops is not None:
            values["mfu"] = self.flops / seconds / self.peak_flops
        values |= {f"seconds_{part}": value for part, value in watch.breakdown.items()}
        if self.world.size > 1:
            slowness, stragglers = self.stragglers.step(ranks[:, 4])
            values |= slowness
            for rank in stragglers:
                metrics.say(
                    f"straggler: {self.world.reports[rank]} computes {ranks[rank, 4] / ranks[:, 4].median():.1f} times as long as "
                    f"the median rank, and has in {config.log.straggler_steps} steps in a row (log.straggler_steps)"
                )
        metrics.write("train", self.progress.step, **values)
        metrics.advance(loss, speed)
        if ranks[:, 3].any():
            self.checkpoints.wait()
        return bool(ranks[:, 2].any())

    def _evaluate(self, metrics: Metrics) -> Evaluation:
        assert self.eval_batches is not None
        with self.world.phase("step", "evaluation"):
            evaluation = evaluate(self.engine.model, self.eval_batches, self.vocab, self.world)
        positions = {f"loss_at_{first}": loss for first, loss in evaluation.by_position().items()}
        metrics.write("eval", self.progress.step, loss=evaluation.loss, tokens=evaluation.tokens, **positions)
        metrics.say(f"step {self.progress.step}: held-out loss {evaluation.loss:.4f}")
        return evaluation

    def _finish(self, metrics: Metrics) -> Summary:
        config = self.config
        folder = Path(config.checkpoint.dir) / EXPORT
        evaluation = None if self.eval_batches is None else self._evaluate(metrics)
        unigram = None
        if evaluation is not None:
            unigram = evaluation.unigram_loss(count_tokens(self.train_set, self.vocab, config.data.seq_len))
            metrics.say(
                f"final held-out loss {evaluation.loss:.4f} nats per token over {evaluation.tokens:,} tokens; "
                f"unigram model {unigram:.4f}; ratio {evaluation.loss / unigram:.3f}"
            )
        with self.world.phase("save", "exporting the model"):
            export_model(self.engine, config, self.hf_config, self.world, folder)
            self.world.from_main(lambda: self._draw(metrics, evaluation, unigram))
        metrics.say(f"model: {folder}   metrics and plots: {config.log.dir}")
        return Summary(self.progress, None if evaluation is None else evaluation.loss, unigram, folder)

    def _draw(self, metrics: Metrics, evaluation: Evaluation | None, unigram: float | None) -> None:
        from ring_hilbert.training.plots import plot_loss, plot_loss_by_position  # Matplotlib: on one rank, at the end

        logs = Path(self.config.log.dir)
        plot_loss(read_metrics(metrics.path), unigram, logs / "loss.png")
        if evaluation is not None:
            plot_loss_by_position(evaluation, logs / "loss_by_position.png")
