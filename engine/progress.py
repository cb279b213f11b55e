"""Helpers of a training loop: what happens between steps, a scheduler's signals, the log's rows."""

import math
import signal
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.terminal import say

MAX_BAD_STEPS = 10  # skipped steps in a row at which a run stops
PATIENCE = 2.0  # seconds; a signal repeated within this time is the same request
SPIKE, SPIKE_AFTER = 4.0, 100  # times the usual loss; steps before the first spike


class Steps:
    """The steps that a run has left, to loop over; the loop calls `end` after each of them.

    `end` writes the log and, on the first rank, calls save(steps done) every `save_every` steps,
    after the last step and when a signal asks for it, and look(steps done) after every step. The
    loop ends after the last step, or when a signal asks to leave (see Watch).
    """

    def __init__(self, first, last, batch, log_every, save_every, log, ranks, save, look):
        self.first, self.last, self.save_every, self.log = first, last, save_every, log
        self.ranks, self.save, self.look = ranks, save, look
        self.watch, self.leave = Watch(ranks), False
        self.batch, self.log_every = batch, log_every

    def __iter__(self):
        for self.step in range(self.first, self.last):
            yield self.step
            if self.leave:
                return

    def end(self, outcome, rate):
        """outcome: of `optimizer_step`; rate: the step's learning rate."""
        done = self.step + 1 if outcome else self.step  # None: asked to leave in mid-step
        if outcome:
            self.progress.report(done, outcome, rate)
        self.leave, save = self.watch.agree()
        due = done % self.save_every == 0 and not self.progress.bad  # not after a bad step
        if self.ranks.first and (done == self.last or self.leave or save or due):
            self.save(done)
        if self.leave:
            say(f"Asked to leave: saved after {done} steps; the same command goes on.")
        elif self.ranks.first:
            self.look(done)

    def __enter__(self):
        # Without this row a run was killed after saving, before validating.
        if self.ranks.first and self.first and not self.log.has_validation(self.first):
            self.look(self.first)
        self.progress = Progress(self.first, self.last, self.batch, self.log_every, self.log,
                                 self.ranks)
        self.watch.__enter__()
        return self

    def __exit__(self, *error):
        self.progress.__exit__()
        self.watch.__exit__()


class Watch:
    """Listens for a scheduler's signals while a run trains.

    SIGTERM and SIGINT (preemption, Ctrl-C) ask to save and leave, SIGUSR1 to save and go on. A
    second SIGTERM or SIGINT ends the program at once, but not within two seconds: torchrun forwards
    signals to ranks that already got them from a scheduler or a terminal.
    """

    def __init__(self, ranks):
        self.ranks, self.leave, self.save, self.before = ranks, False, False, {}
        self.asked = math.inf  # time of the first request to leave

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGUSR1:
            self.save = True
        elif now > self.asked + PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        else:
            self.leave, self.asked = True, min(self.asked, now)

    def agree(self):
        """(leave, save), the same on all ranks: whether any rank got the request. Resets `save`."""
        wishes = torch.tensor([self.leave, self.save], dtype=torch.int32, device=self.ranks.device)
        self.save = False
        if self.ranks.world > 1:
            dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        return [bool(wish) for wish in wishes.tolist()]


class Progress:
    """The bar on the terminal, and every `log_every` steps a row of log.jsonl.

    The row has the step (counted from 1), the mean of each loss since the last row, the
    learning rate and the samples per second.
    """

    def __init__(self, first, steps, samples, log_every, log, ranks):
        self.steps, self.samples, self.log_every, self.log = steps, samples, log_every, log
        self.bar = tqdm(initial=first, total=steps, unit="step", disable=not ranks.first)
        self.sums, self.count, self.since = {}, 0, time.perf_counter()
        self.first, self.bad, self.usual, self.good = first, 0, None, 0

    def report(self, done, outcome, rate):
        """Takes the Outcome and the learning rate of step number `done`.

        ValueError after ten skipped steps in a row, or if all steps were skipped.
        """
        self.bar.update()
        if outcome.bad:
            self.note_bad(done, outcome.bad)
            if done == self.steps and not self.good:
                raise ValueError(f"all of the {done - self.first} steps were skipped, so nothing "
                                 "was learnt or saved: try a lower --lr or --precision float32.")
        else:
            self.bad, self.good = 0, self.good + 1
            self.note_spike(done, outcome)
            self.count += 1
            for name, value in outcome.losses.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
        if not self.count or done % self.log_every and done != self.steps:
            return
        now = time.perf_counter()
        speed = self.count * self.samples / (now - self.since)
        means = {name: value / self.count for name, value in self.sums.items()}
        self.log.write({"step": done, **means, "lr": rate, "samples_per_second": round(speed, 3)})
        self.bar.set_postfix_str(f"loss {means['loss']:.4f}, lr {rate:.1e}, {speed:.2f} samples/s")
        self.sums, self.count, self.since = {}, 0, now

    def note_bad(self, done, names):
        self.bad += 1
        self.log.write({"step": done, "skipped": names})
        say(f"Step {done} was skipped: its loss or gradient is not finite ({', '.join(names)}).")
        if self.bad == MAX_BAD_STEPS:
            raise ValueError(f"{self.bad} steps in a row had a loss or gradient that is not "
                             "finite: try a lower --lr, --clip-gradient 1 or --precision float32, "
                             f"and look at the samples of the last one ({', '.join(names)}).")

    def note_spike(self, done, outcome):
        """Logs a step whose loss is several times that of the steps before it."""
        loss = outcome.losses["loss"]
        if self.usual is not None and done > self.first + SPIKE_AFTER and (
                loss > SPIKE * self.usual):
            self.log.write({"step": done, "spike": loss, "usual": self.usual,
                            "samples": outcome.names})
        self.usual = loss if self.usual is None else 0.98 * self.usual + 0.02 * loss

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()  # before the error's sentence is printed
