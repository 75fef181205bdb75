"""The training loop of one rank: the same for a worker of Ray Train and for a trial of Ray Tune.

Every random draw is a function of (seed, step, rank) or (seed, epoch, row), so that a checkpoint needs no random state
and a continued run equals an uninterrupted one bit for bit (CPU, float32, same thread count).
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mpc.build import adjust, build_method
from mpc.method import Batch, Method, Progress, StepOutput
from mpc.model import Classifier, Ema
from mpc.transfer import Transfer
from mpc.update import update
from pipeline.card import DatasetCard
from pipeline.config import RunConfig
from pipeline.divergence import REPORT, DivergedError, Watch, as_json, describe
from pipeline.host import Host, Metrics
from pipeline.meter import Meter
from pipeline.plan import make_plan
from pipeline.record import is_epoch
from pipeline.saved import gathered, restore, save
from pipeline.schedule import in_force, stages
from pipeline.scoring import NO_CHOICES, Choices, Scored, score_rows, validation_metrics
from pipeline.setup import (
    Timed,
    augmented,
    compile_backbone,
    make_model,
    make_optimizer,
    make_views,
    placed,
    relative_rate,
    set_rates,
)
from pipeline.spans import TrainingData
from pipeline.stream import batches
from pipeline.usage import Usage


class _Step(nn.Module):
    """Model and method as one module, so that DDP sees every parameter of a step."""

    def __init__(self, model: Classifier, method: Method) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, batch: Batch, progress: Progress) -> tuple[Tensor, StepOutput]:
        output = self.method.step(self.model, batch, progress)
        return output.loss, output


class Loop:
    """Trains one run on one rank.

    Args:
        run: the resolved configuration.
        data: URI of the prepared data set.
        card: its dataset card.
        host: who runs it.
    """

    def __init__(self, run: RunConfig, data: str, card: DatasetCard, host: Host) -> None:
        torch.set_num_threads(run.train.threads)
        torch.manual_seed(run.train.seed)
        self.run, self.data, self.card, self.host = run, data, card, host
        self.now = run
        self.plan = make_plan(card, seed=run.train.seed, batch_size=run.train.batch_size, window=run.data.window)
        self.total_steps = run.train.epochs * self.plan.steps_per_epoch
        self.model = placed(make_model(run, card), host.device, channels_last=run.train.channels_last)
        self.ema = Ema(self.model, run.optim.ema)
        if run.train.compile:
            compile_backbone(self.model)
        self.method = build_method(run.train.method, run, self.model, self.ema.module)
        self.method.setup(self.plan.num_rows, len(card.findings))
        if isinstance(self.method, nn.Module):
            self.method.to(host.device)
        self.views = make_views(run, card, host.device, strong=self.method.needs_strong)
        step_module = _Step(self.model, self.method)
        self.step_module = DistributedDataParallel(step_module) if host.world_size > 1 else step_module
        self.optimizer = make_optimizer(run, self.method.param_groups(self.model, run.optim.lr), host.device)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate())
        self.scaler = torch.amp.GradScaler(host.device.type, enabled=run.train.amp == "fp16")
        self.meter, self.watch, self.usage = Meter(host.device), Watch(host.device), Usage(host.device)
        self.step = 0

    def _rate(self) -> Callable[[int], float]:
        """The schedule of this run; not bound to the loop, which would then outlive its trial in a cycle."""
        return partial(relative_rate, warmup=round(self.run.optim.warmup * self.total_steps), total=self.total_steps)

    def fit(self) -> Metrics:
        """Trains to the end, from the host's last checkpoint if it has one; the metrics of the last epoch."""
        with self.host.last_checkpoint() as folder:
            metrics = restore(self, folder) if folder else {}
        self.host.begun(self.step, metrics)
        started, waited, logged = time.perf_counter(), 0.0, self.step
        for batch in self.incoming():
            waited += batch.waited
            self.train_step(batch.batch)
            notice = self.host.notice(self.step)
            ended = self.step % self.plan.steps_per_epoch == 0
            if self.step % self.run.train.log_every == 0 and not ended:
                self._show(started, waited, logged)
            if ended:
                metrics = self.end_epoch(time.perf_counter() - started, waited, self.step - logged)
                started, waited, logged = time.perf_counter(), 0.0, self.step
            elif notice != "go" or self._due(self.run.train.checkpoint_every):
                self._report({"step": self.step, "epoch": self.step / self.plan.steps_per_epoch}, NO_CHOICES)
            if notice == "stop":
                break
        return metrics

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def incoming(self) -> Iterator[Timed]:
        """Batches from the running step on, on the device, each with the seconds that it was waited for."""
        schedule = self.run.train.schedule
        for stage in stages(schedule, self.run.train.epochs, self.plan.steps_per_epoch, self.step):
            self._change(self.run.at(stage.epoch) if schedule else self.run)
            yield from self._until(stage.stop)

    def _until(self, stop: int) -> Iterator[Timed]:
        """Batches up to a step, made with the settings of now."""
        run, host = self.now, self.host
        data = TrainingData(
            self.data,
            self.card,
            run.views,
            strong=self.method.needs_strong,
            augment=self.views is None,
            seed=run.train.seed,
            draw_seed=run.data.draw_seed,
            tasks=run.data.tasks,
            task_cpus=run.data.task_cpus,
            backend=run.data.backend,
        )
        transfer = Transfer(host.device)
        asked = time.perf_counter()
        for arrays in batches(data, self.plan, host.rank, host.world_size, self.step, stop):
            yield Timed(transfer(arrays), time.perf_counter() - asked)
            asked = time.perf_counter()

    def _change(self, now: RunConfig) -> None:
        """Goes on with other settings; also after a restore, whose optimiser carries the rates of before."""
        if now == self.now:
            return
        self.now = now
        self.views = make_views(now, self.card, self.host.device, strong=self.method.needs_strong)
        adjust(self.method, now)
        peaks = [group["lr"] for group in self.method.param_groups(self.model, now.optim.lr)]
        set_rates(self.optimizer, self.schedule, peaks, now.optim.weight_decay)

    def train_step(self, batch: Batch) -> None:
        """Forward, backward, clip, optimiser, schedule, average."""
        torch.manual_seed(self._seed())
        self.model.train()
        if self.views is not None:
            batch = augmented(batch, self.views, self._seed("views"))
        progress = Progress(self.step, self.plan.steps_per_epoch, self.run.train.epochs)
        loss, output = self.step_module(batch, progress)
        self.watch.add(loss, self.step)
        if loss.device.type == "cpu":
            self._refuse_nan()  # on a GPU looking synchronises, and steps that log look
        update(loss, self.optimizer, self.scaler, self.now.optim.clip)
        self.schedule.step()
        self.step += 1
        self.ema.update(self.model, step=self.step)
        self.meter.add(output)

    def _seed(self, what: str = "") -> int:
        """Of this step on this rank."""
        text = f"{self.run.train.seed}:{self.step}:{self.host.rank}{what}"
        return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")

    def _refuse_nan(self) -> None:
        """Stops every rank at a loss that was not finite, and names its images."""
        found = self.watch.look()
        if found is None:
            return
        step, ranks = found
        rate = self.now.optim.lr * self._rate()(step)
        known = describe(self.data, self.card, self.plan, step, ranks, rate)
        place = self.host.leave(REPORT, as_json(known)) if self.host.rank == 0 else REPORT
        raise DivergedError(
            f"the loss is not finite at step {step}, learning rate {rate:.3g}, rows {known['rows'][:8]} ...; {place} "
            f"lists the images of that batch; lower optim.lr or look at them"
        )

    def end_epoch(self, seconds: float, waited: float, steps: int) -> Metrics:
        """Validation with the averaged weights, then a checkpoint with all metrics of the epoch."""
        self._refuse_nan()
        self.method.on_epoch_end(self._score_training_rows)
        scored = self._score("val")
        chosen = validation_metrics(scored, self.card.findings, self.run.data) if scored else ({}, NO_CHOICES)
        values, choices = chosen
        metrics: Metrics = {
            "epoch": self.step // self.plan.steps_per_epoch,
            "step": self.step,
            "lr": self.schedule.get_last_lr()[0],
            **self.meter.metrics(),
            **values,
            "images_per_s": steps * self.run.train.batch_size / seconds,
            "data_wait_share": waited / seconds,
            "seconds": seconds,
            **({"settings": in_force(self.now, self.run.train.schedule)} if self.run.train.schedule else {}),
        }
        self.meter = Meter(self.host.device)
        self._report(self._from_rank_zero(metrics), choices)
        return metrics

    def _from_rank_zero(self, metrics: Metrics) -> Metrics:
        if self.host.world_size == 1:
            return metrics
        held = [metrics]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def _score(self, split: str) -> Scored | None:
        """Scores of a split on rank 0, gathered by row; None on other ranks."""
        if self.host.world_size > 1:
            for buffer in self.ema.module.buffers():
                dist.broadcast(buffer, src=0)
        host, size = self.host, self.run.train.eval_batch_size
        own = score_rows(self.ema.module, self.data, self.card, split, size, host.device, host.rank, host.world_size)
        return own.gathered(self.card.rows(split))

    def _score_training_rows(self) -> Tensor:
        assert self.host.world_size == 1, "methods that relabel between epochs run on one worker"
        scored = self._score("train")
        assert scored is not None
        return torch.from_numpy(scored.logits)

    def _show(self, started: float, waited: float, since: int) -> None:
        self._refuse_nan()
        metrics = self.meter.metrics()  # every rank takes part in the reduction
        seconds = time.perf_counter() - started
        rate = (self.step - since) / seconds
        line = {
            "step": self.step,
            "steps": self.total_steps,
            **{name: value for name, value in metrics.items() if name.startswith("loss")},
            "images_per_s": rate * self.run.train.batch_size,
            "data_wait_share": waited / seconds,
            "eta_s": (self.total_steps - self.step) / rate,
        }
        self.host.log(line)

    def _report(self, metrics: Metrics, choices: Choices) -> None:
        self._refuse_nan()  # no checkpoint holds weights of a run that has diverged
        host = self.host
        meters = gathered(self.meter.state_dict(), host.rank, host.world_size)
        with TemporaryDirectory(prefix="mpc-cxr-", dir=host.scratch) as folder:
            path = Path(folder) / f"step-{self.step:08d}"
            if host.rank == 0:
                save(self, path, metrics, choices, meters)
            # beside the metrics, not among them: a checkpoint is equal to another one whatever its machine did
            host.report({**metrics, **(self.usage.metrics() if is_epoch(metrics) else {})}, path)
