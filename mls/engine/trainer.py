"""The loop: one for CPU, one GPU and many. It knows nothing of the method but its contract (core/method.py)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mls import distributed
from mls.config import Config, EngineConfig, to_dict
from mls.core import methods
from mls.core.method import StepOutput, gradient_norms
from mls.data import Batch, Source
from mls.data.augment import Augment, in_worker
from mls.data.augment_compiled import CompiledAugment
from mls.data.formats import missed
from mls.data.loader import Loader, remedy, steps_per_epoch
from mls.data.sources import build_source
from mls.data.unreadable import Unreadable
from mls.distributed import Process
from mls.engine import optim
from mls.engine.checkpoint import Checkpoints, Copied, non_finite
from mls.engine.events import versions
from mls.engine.findings import Plan, Sizes, at_start, memory
from mls.engine.images import accept_other_images, hash_of_names, hash_of_some, keep_names
from mls.engine.run import Run, probe_of, refuse_another_configuration
from mls.engine.schedule import between, cosine, epoch_of
from mls.engine.session import Saving, Session
from mls.errors import CheckpointError, DivergedError, Stopped, command
from mls.files import CHECKPOINTS_FULL, write_atomically
from mls.locks import Lock
from mls.models import Encoder, save_backbone
from mls.models.any_size import refuse_size
from mls.models.momentum import HALF, precision_on
from mls.monitor import moments
from mls.monitor.dense import DenseProbe
from mls.monitor.guard import Guard
from mls.monitor.labels import label_quality
from mls.monitor.log import MetricsLog
from mls.monitor.matches import MomentTaker, moment_epochs
from mls.monitor.online import OnlineProbes
from mls.monitor.verdict import WAITING
from mls.monitor.window import Window
from mls.progress import duration, for_people, summary
from mls.recipes import from_dict
from mls.streams import derive
from mls.tables import markdown_table

LEAST_SCALE = 2.0**-10  # of fp16's loss; it begins at 2**16
MOST_LABELS = 250_000_000  # images × classes whose labels are held for monitoring: a gigabyte


class Trainer:
    def __init__(
        self,
        config: Config,
        run: Run,
        process: Process,
        quiet: bool = False,
        lock: Lock | None = None,
        accept_data: bool = False,
    ) -> None:
        _compute_as(config.engine)
        precision = precision_on(process.device, config.engine.precision)
        self.config, self.run, self.process, self.quiet = config, run, process, quiet
        self.precision, self.lock, self.accept_data = precision, lock, accept_data
        self.source = build_source(config.data)
        self.names = hash_of_names(self.source)
        self.steps_per_epoch = steps_per_epoch(self.source, config)
        self.total = config.optim.epochs * self.steps_per_epoch

        labels = watched_labels(self.source)
        self.labels = None if labels is None else labels.to(process.device)
        self.method = methods.build(config, precision, self.labels).to(process.device)
        if config.engine.channels_last:
            self.method.to(memory_format=torch.channels_last)
        self.method.refuse(self.source)
        self.plan = self.method.views()
        self.refuse_sizes()
        self.optimizer = optim.build(config, self.method, self.method.own_rates(), self.method.backbone)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
        self.augment = self.build_augment()
        if config.engine.compile:
            for module in self.method.modules():
                if isinstance(module, Encoder):
                    module.compile()
        self.forward: torch.nn.Module = averaging_gradients(self.method) if process.world > 1 else self.method

        # A bad step must leave no trace: batch statistics move in forward, before anyone knows.
        self.buffers = [buffer for buffer in self.method.buffers() if buffer.is_floating_point()]
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.session, self.probes = self.build_session(), self.build_probes()
        self.step = 0  # steps taken
        self.window = Window(process.device)
        self.terms: set[str] | None = set()  # parts of the loss that have acted; None: not known of an older checkpoint
        most, listed = self.config.data.max_unreadable, self.run.path / "unreadable.txt"
        self.unreadable = Unreadable(len(self.source), most, self.session.say, listed, "data.max_unreadable")
        self.bad_in_a_row = 0
        self.bad_steps = 0
        self.log_offset = 0
        self.guarded: dict[str, float] = {}  # what the start was worth
        self.guarded_on: str | None = None  # on these images; None: not known of an older checkpoint
        self.restore()

    def build_augment(self) -> Augment:
        # Autocast would round the views in the first convolution; here it halves their memory, and changes no bit.
        half, engine = HALF.get(self.precision, torch.float32), self.config.engine
        parts = (self.config.augment, self.config.run.seed, self.process.device, engine.channels_last, half)
        kind = CompiledAugment if engine.compile and not in_worker(engine, self.process.device) else Augment
        # Without micro-batches a step is over before the next one's views are made.
        return kind(*parts, self.plan.positions, reuse=engine.accumulate == 1)

    def refuse_sizes(self) -> None:
        """Networks of timm may take images of one size alone."""
        if self.config.model.backbone.startswith("timm:"):
            for size in sorted({view.size for view in self.plan.views}):
                refuse_size(self.method.backbone, size, "the size of the views (augment.size, augment.small_size)")

    def build_probes(self) -> list[OnlineProbes | DenseProbe]:
        dense = DenseProbe.build(self.config, self.source)
        if dense is not None:
            dense.refuse_unusable(self.method.backbone, self.process.device)
        online = OnlineProbes.build(self.config, self.source, lambda text: self.session.warn(text))
        return [probe for probe in (online, dense) if probe is not None]

    def build_session(self) -> Session:
        engine = self.config.engine
        store = Checkpoints(self.run.checkpoints, engine.keep_last)
        events, export = self.run.path / "events.jsonl", self.export_backbone
        saving = Saving(store, events, engine.checkpoint_minutes, engine.checkpoint_every, self.refuse_to_save, export)
        how_to_resume = f"{command('mls pretrain --resume', self.run.path)} goes on"
        return Session(self, self.total, saving, self.process.device, how_to_resume)

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> None:
        began, first = time.monotonic(), self.step + 1
        with contextlib.ExitStack() as stack:
            self.open_log(stack)
            stack.enter_context(self.session.running(self.run.name, self.quiet))
            self.guard = self.build_guard()
            self.moment_epochs = moment_epochs(self.config.optim.epochs, self.config.monitor.moments)
            where = self.process.device, HALF.get(self.precision, torch.float32)
            self.take_moment = MomentTaker(self.config, self.source, self.plan, *where, self.labels)
            self.introduce()
            last = min(self.total, self.config.engine.max_steps or self.total)
            loader = Loader(self.source, self.config, self.process, self.step + 1, last, plan=self.plan)
            batches = iter(loader)
            self.window.restart_clock()
            self.hint_from = self.step + self.config.monitor.log_every + 1  # workers need a moment to start
            while self.step < last:
                micro_batches = [next(batches) for _ in range(self.config.engine.accumulate)]
                self.window.waited += loader.waited
                loader.waited = 0.0
                self.train_step(micro_batches)
                self.after_step()
            self.finish(last)
        if self.process.main and not self.quiet:
            seconds = time.monotonic() - began
            print("\n".join(last_words(self.run, first, self.step, seconds)), file=sys.stderr, flush=True)

    def train_step(self, micro_batches: list[Batch]) -> None:
        """One optimizer update, or none where a loss or gradient is not finite."""
        self.step += 1
        epoch = epoch_of(self.step, self.steps_per_epoch)
        optim.set_lr(self.optimizer, self.lr(self.step), self.weight_decay(self.step))
        self.method.momentum = self.momentum(self.step)
        self.method.set_progress(self.step, epoch, self.steps_per_epoch)
        self.refresh(epoch)
        self.optimizer.zero_grad(set_to_none=True)
        # What a network drops at random follows from the seed and the step, so a resume needs nothing else.
        torch.manual_seed(derive(self.config.run.seed, "dropout", self.step, self.process.rank))
        torch._foreach_copy_(self.buffers_before, self.buffers)
        logging = self.logs()

        outputs: list[StepOutput] = []
        for number, batch in enumerate(micro_batches):
            self.unreadable.note(batch.unreadable)
            views = self.augment(batch)
            with self.no_sync_until_last(number, len(micro_batches)):
                out = self.forward(views)
                if logging:
                    with self.window.measuring():
                        out.scalars |= out.measure()
                        self.window.pulls = self.window.pulls if number else gradient_norms(out)
                self.scaler.scale(out.loss / len(micro_batches)).backward()
            outputs.append(out)

        # The one place where the CPU waits for the device: all processes agree on skipping and on stopping.
        # (fp16's scaler skips overflowing steps itself, so there only the loss is looked at.)
        finite = bool(torch.isfinite(self.loss_and_gradient(outputs)).all())
        (bad,) = self.session.agree(not finite)
        if bad:
            self.skip_step(epoch, micro_batches)
        else:
            self.bad_in_a_row = 0
            self.step_optimizer()
            if logging and self.process.main:
                with self.window.measuring():
                    self.window.labels = self.label_quality(outputs[0])
            self.note_terms(outputs[0])
            self.method.after_step(outputs)
            self.window.add(outputs)

    def after_step(self) -> None:
        step, monitor = self.step, self.config.monitor
        epoch = epoch_of(step, self.steps_per_epoch)
        epoch_ends = step % self.steps_per_epoch == 0
        values: dict[str, float] = {}
        if epoch_ends and epoch in self.moment_epochs:
            self.keep_moment(epoch)
        for probe in self.probes if epoch_ends else ():
            with self.window.measuring("probes"):
                values |= probe(self.method.backbone, epoch, self.process.device)
        if epoch_ends and self.guard is not None and epoch % monitor.guard_every_epochs == 0:
            with self.window.measuring("probes"):
                values |= self.guard.measure(self.method.backbone, self.process.device)
        if self.process.main and (step % monitor.health_every == 0 or step == self.total):
            with self.window.measuring():
                values |= self.method.health()
        if self.logs():  # last, so that the cost of all that is measured at this step is told here
            values |= self.measurements()
        if self.process.main:
            if values.get("data_wait", 0.0) > WAITING and step >= self.hint_from:
                self.hint_from = math.inf
                share = f"{values['data_wait']:.0%} of the time goes into waiting for data"
                self.session.say(f"{share}: {remedy(self.source, self.config)}")
            if values:
                self.refuse_if_another_trains()
                with self.window.measuring():
                    self.log.write(step, epoch, values)
                self.session.progress.update(step, epoch, for_people(values))
        if self.guard is not None:
            self.heed(self.guard.fallen(values), epoch)
        every = self.config.engine.milestone_epochs
        # Skipped steps may mean that what was learnt before them is worth nothing: no good checkpoint goes for them.
        self.session.end_step(bool(every) and epoch_ends and epoch % every == 0, doubtful=self.bad_in_a_row > 0)

    def build_guard(self) -> Guard | None:
        """What the start is worth is measured before the first step, and is part of the state."""
        guard = Guard.build(self.config, self.source)
        if guard is None:
            return None
        images, count = hash_of_some(self.source, guard.sample.ids), len(guard.sample.ids)
        if self.step == 0:
            self.guarded, self.guarded_on = guard.measure(self.method.backbone, self.process.device), images
        if self.guarded and self.guarded_on in (None, images):
            guard.start = self.guarded
            self.session.say(f"the start on {count} fixed images: {guard.told(guard.start)}")
        else:  # and the network has moved since
            what = f"no start was measured on these {count} images (give monitor.guard_images and images as they were)"
            self.session.warn(f"the guard has nothing to compare with: {what}")
        return guard

    def heed(self, fallen: str, epoch: int) -> None:
        """Where the run has unlearnt more than its guard allows. All processes have the same numbers."""
        if not fallen:
            return
        self.session.events.write("forgotten", step=self.step, epoch=epoch, what=fallen)
        if self.config.monitor.guard == "stop":
            raise DivergedError(f"after epoch {epoch} {fallen}: {self.remedy_for_divergence()}")
        self.session.warn(
            f"after epoch {epoch} {fallen}: a lower optim.lr or optim.layer_decay keeps more of the start"
        )

    def logs(self) -> bool:
        """Is a line of the log due at this step? At the last one always, so that a run's end is in its log."""
        return self.step % self.config.monitor.log_every == 0 or self.step == self.total

    def finish(self, last: int) -> None:
        self.session.finish()
        if last < self.total:
            raise Stopped(self.session.farewell(f"engine.max_steps={last} is reached"), 0)
        if self.process.main:
            self.log.conclude()
            write_atomically(self.run.path / "DONE", f"{self.step} steps\n".encode(), CHECKPOINTS_FULL)
        distributed.barrier()

    # ------------------------------------------------------------------------------------------------ one step's parts

    def refresh(self, epoch: int) -> None:
        """What the method works out from the whole data set before this step, if anything. A signal ends it: a resume
        begins it anew."""
        began, cpu = time.monotonic(), time.process_time()
        try:
            found = self.method.refresh(self.source, self.tell)
        except InterruptedError:
            self.step -= 1
            self.session.end_step()  # raises Stopped
            raise
        if not found:
            return
        seconds = round(time.monotonic() - began, 1)
        cpu = round(time.process_time() - cpu, 1)
        self.session.events.write("refresh", step=self.step, epoch=epoch, seconds=seconds, cpu_seconds=cpu, **found)
        words = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        self.session.say(f"epoch {epoch}: refreshed from all images in {duration(seconds)}, {words}")
        if self.process.main:
            self.log.write(self.step, epoch, found)
        self.window.restart_clock()

    def tell(self, what: str, done: int, of: int) -> None:
        self.session.progress.note(what, done, of)
        self.session.agree()
        if self.session.stopping:
            raise InterruptedError

    def lr(self, step: int) -> float:
        warmup = round(self.config.optim.warmup_epochs * self.steps_per_epoch)
        return optim.scaled_lr(self.config) * cosine(step, self.total, warmup, self.config.optim.final_lr)

    def weight_decay(self, step: int) -> float | None:
        first, last = self.config.optim.weight_decay, self.config.optim.final_weight_decay
        return None if last is None else between(step, self.total, first, last)

    def momentum(self, step: int) -> float:
        first, last = self.config.model.momentum, self.config.model.final_momentum
        return first if last is None else between(step, self.total, first, last)

    def step_optimizer(self) -> None:
        """fp16's scaler leaves steps out while it looks for a scale that no gradient overflows with. Where gradients
        are not finite at any scale there is none."""
        self.clip_gradient()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise DivergedError(
                f"fp16 has found no scale with finite gradients up to step {self.step}: {self.remedy_for_divergence()}"
            )

    def clip_gradient(self) -> None:
        if (most := self.config.optim.clip_norm) is None:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if (norm := self.window.gradient) is None:  # fp16's gradients are scaled
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, most)
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)

    def no_sync_until_last(self, number: int, count: int) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.forward, DistributedDataParallel) and number < count - 1:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def loss_and_gradient(self, outputs: list[StepOutput]) -> Tensor:
        values = [out.loss.detach() for out in outputs]
        if not self.scaler.is_enabled():
            grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            values.append(torch.nn.utils.get_total_norm(grads))
            self.window.gradient = values[-1]
        return torch.stack(values)

    def skip_step(self, epoch: int, micro_batches: list[Batch]) -> None:
        self.bad_steps += 1
        self.bad_in_a_row += 1
        torch._foreach_copy_(self.buffers, self.buffers_before)
        row = {"step": self.step, "epoch": epoch, "rank": self.process.rank}
        row["ids"] = [int(i) for batch in micro_batches for i in batch.ids]
        with open(self.run.path / f"skipped.{self.process.rank}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        self.session.events.write("skip", step=self.step, epoch=epoch)
        self.session.say(f"step {self.step} gave a non-finite loss or gradient: skipped, image ids in skipped.*.jsonl")
        if self.bad_in_a_row >= self.config.engine.max_bad_steps:
            raise DivergedError(
                f"{self.bad_in_a_row} non-finite steps in a row up to step {self.step}: {self.remedy_for_divergence()}"
            )

    def remedy_for_divergence(self) -> str:
        steps, lower = Checkpoints(self.run.checkpoints, 1).steps(), self.config.optim.lr / 10
        words = (self.run.path / "config.yaml", "--name", f"{self.run.name}-again", f"optim.lr={lower:g}")
        again = f"from the start: {command('mls pretrain', *words)}"
        if steps:
            branch = self.run.branch_command(steps[-1], [("optim.lr", float(f"{lower:g}"))])
            again = f"from the last step that was saved (kept: {', '.join(map(str, steps))}): {branch}, or {again}"
        return f"lower optim.lr, add optim.warmup_epochs or use engine.precision=fp32, in a new run {again}"

    def refuse_if_another_trains(self) -> None:
        """It may have taken this process for dead, while it was suspended or cut off."""
        if self.lock is not None:
            self.lock.check()

    def refuse_to_save(self, state: dict[str, Any]) -> None:
        """No good checkpoint is replaced by one that holds no numbers."""
        self.refuse_if_another_trains()
        broken = list(non_finite({key: state[key] for key in ("method", "optimizer")}))
        if broken:
            raise DivergedError(
                f"after step {state['step']} {len(broken)} tensors hold NaN or infinity, such as {broken[0]}, so "
                f"it was not saved: {self.remedy_for_divergence()}"
            )

    # ------------------------------------------------------------------------------------------------ what is measured

    def label_quality(self, out: StepOutput) -> dict[str, float]:
        if self.labels is None or out.matched_ids is None or out.query_ids is None or out.candidate_ids is None:
            return {}
        return label_quality(self.labels, out.query_ids, out.matched_ids, out.candidate_ids)

    def keep_moment(self, epoch: int) -> None:
        from mls.engine.gallery import drawn

        if not (self.process.main or self.method.saves_together):
            return
        with self.window.measuring():
            moment = self.take_moment(self.method, self.step, epoch)
            if moment is not None and self.process.main:
                self.refuse_if_another_trains()
                moments.write(self.run.path, moment)
                self.session.events.write("moment", step=self.step, epoch=epoch, seconds=moment.seconds)
                self.log.show(self.step, "gallery", lambda: drawn(moment, self.source, self.config, self.labels))

    def note_terms(self, out: StepOutput) -> None:
        """When a part of the loss acts for the first time: the multi-label term joins after a while."""
        acting = {name for name in out.parts if f"loss/{name}" in out.scalars}
        for name in sorted(acting - self.terms) if self.terms is not None else ():
            self.session.events.write("term", name=name, step=self.step)
        self.terms = acting | (self.terms or set())

    def measurements(self) -> dict[str, float]:
        values = self.window.read()
        values["lr"] = self.lr(self.step)
        values |= self.method.measurements()
        values["skipped_steps"] = float(self.bad_steps)
        values["unreadable_images"] = float(len(self.unreadable.found))
        values["images_per_second"] = self.config.data.batch_size * values.pop("steps_per_second")
        if self.process.device.type == "cuda":
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.process.device) / 2**30
        return values

    def introduce(self) -> None:
        config = self.config
        scaled = optim.scaled_lr(config)
        words = [
            f"{self.run.path}",
            f"{len(self.source)} images from {self.source.name}, {self.steps_per_epoch} steps an epoch, "
            f"{self.total} steps, on {self.process.world} × {self.process.device.type} in {self.precision}",
            f"learning rate {scaled:g} ({config.optim.lr:g} per 256 images, batch {config.data.batch_size})",
        ]
        if odd := getattr(self.source, "odd", None):
            words.append(f"{odd}; they are left out")
        if ignored := getattr(self.source, "ignored", ()):
            words.append(missed(ignored))
        first = self.step + 1
        self.method.set_progress(first, epoch_of(first, self.steps_per_epoch), self.steps_per_epoch)
        words += self.method.introduction()
        for sentence in words:
            self.session.say(sentence)
        if self.step == 0:
            plan, sizes = Plan(config, len(self.source), self.process.world), Sizes.of(self.method, config)
            needed = memory(plan, sizes, self.process.device)
            if needed.level == "fine":
                self.session.say(f"memory, estimated: {needed.measured}")
            for sentence in [*([] if needed.level == "fine" else [needed.sentence]), *at_start(plan, sizes)]:
                self.session.warn(sentence)

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        method: dict[str, Any] = {}
        if self.process.main or self.method.saves_together:
            method = self.method.state_dict()
            method["_extra_state"] = Copied(method["_extra_state"])
        if self.process.main:
            self.log_offset = self.log.offset()
        return {
            "format": 2,
            "step": self.step,
            "config": to_dict(self.config),
            "method": method,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": self.window.state_dict(),
            "log_offset": self.log_offset,
            "unreadable": list(self.unreadable.found.items()),
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
            "decided": self.decided,
            "terms": sorted(self.terms or ()),
            **({"guarded": self.guarded, "guarded_on": self.guarded_on} if self.guarded else {}),
            "images": len(self.source),
            "names": self.names,
            "versions": versions(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.method.load_state_dict(method_state(state))
        # What a group is trained with is the configuration's, of which a branch may have another one.
        groups, saved = self.optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
            raise ValueError("its optimizer holds other parameters")
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.window.load_state_dict(state["window"])
        self.log_offset = state["log_offset"]
        self.unreadable.found = dict(state["unreadable"])
        self.bad_steps, self.bad_in_a_row = state["bad_steps"], state.get("bad_in_a_row", 0)
        self.terms = set(state["terms"]) if "terms" in state else None
        self.guarded, self.guarded_on = state.get("guarded", {}), state.get("guarded_on")

    def export_backbone(self, state: dict[str, Any]) -> None:
        """From the copy of a state, while training goes on."""
        card: dict[str, Any] = {"architecture": self.config.model.backbone, "method": self.config.objective.method}
        card |= {"step": state["step"], "epochs": state["step"] / self.steps_per_epoch, "run": self.run.name}
        card |= {"versions": versions(), "config": to_dict(self.config)}
        backbone = self.method.backbone
        (prefix,) = (f"{name}." for name, module in self.method.named_modules() if module is backbone)
        weights = {
            name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)
        }
        save_backbone(self.run.path, backbone, card, self.config.augment, weights)

    def restore(self) -> None:
        state, self.images_changed = self.session.restore(), False
        if state is not None:
            refuse_another_configuration(from_dict(state["config"]), self.config, self.run, state["step"])
            if words := accept_other_images(self.run.path, state, self.source, self.accept_data):
                self.session.warn(words)
                self.images_changed = True
            try:
                self.load_state_dict(state)
            except (LookupError, TypeError, ValueError, RuntimeError) as error:  # torch's own sentence comes second
                reason = (str(error).splitlines()[1:2] or [str(error)])[0].strip()
                raise CheckpointError(
                    f"the checkpoint of step {state['step']} in {self.run.checkpoints} does not fit the "
                    f"configuration ({reason}): leave networks, memories and groups of parameters as they were"
                ) from error
            if self.process.main and self.run.last_saved > self.step:
                self.session.warn(f"step {self.run.last_saved} was saved and is not there: going on from {self.step}")
        self.decided = self.method.decide((state or {}).get("decided", {}), self.process.device)

    def open_log(self, stack: contextlib.ExitStack) -> None:
        if not self.process.main:
            return
        keep_names(self.run.path, self.source)
        if self.images_changed:  # the numbers in older moments name other images now
            shutil.rmtree(self.run.path / moments.FOLDER, ignore_errors=True)
        settings = to_dict(self.config)
        self.log = MetricsLog(self.run.path, self.config.monitor, self.run.name, settings, self.session.warn)
        stack.callback(self.log.close)
        self.log.rewind(self.log_offset)


def last_words(run: Run, first: int, last: int, seconds: float) -> list[str]:
    """What a finished run has come to, and the commands that go on from there."""
    rows = run.metrics()
    of_now = [row for row in rows if row["step"] >= first]
    share = lambda name: f"{fmean([row[name] for row in of_now if row.get(name) is not None] or [0.0]):.1%}"
    since = "" if first == 1 else f" (since step {first})"
    spent = f"{share('data_wait')} of the time waiting for data, {share('monitoring')} measuring for the log"
    spent += f", {share('probes')} in online probes" if any(row.get("probes") for row in of_now) else ""
    words = [f"finished {last} steps in {duration(seconds)}{since}, {spent}"]
    if lines := summary(rows):
        words += ["", markdown_table(["", "first", "last", "by chance"], lines), ""]
    commands = [
        command("mls report", run.path),
        command("mls eval run", *probe_of(run.config), "--weights", run.path),
        command("mls neighbours", run.path, "--figure"),
        command("mls export", run.path),
    ]
    return [*words, "what comes next:", *(f"  {one.strip('`')}" for one in commands)]


def watched_labels(source: Source) -> Tensor | None:
    """The source's labels, for monitors and controls; None where there are none or too many to hold."""
    if source.class_names is None or len(source) * len(source.class_names) > MOST_LABELS:
        return None
    return source.labels


def method_state(state: dict[str, Any]) -> dict[str, Any]:
    """The method's state in a checkpoint; of format 1, where the dictionary stood beside it, too."""
    if "dictionary" in state:
        return {**state["method"], "_extra_state": {"dictionary": state["dictionary"]}}
    return state["method"]


def _compute_as(config: EngineConfig) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses products on a GPU
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def averaging_gradients(method: torch.nn.Module) -> torch.nn.Module:
    """Parameters are equal by construction and buffers are each process' own: DDP only has to average gradients. No
    static_graph: its first step is another one, and a resumed run would differ from a whole one."""
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **distributed.exchanging_buffers(False))
