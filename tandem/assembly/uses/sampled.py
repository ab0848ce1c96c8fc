"""Prompts through an engine, and through rewards where there are any, into a file of rows: nothing is trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem.assembly.configs.uses import UseConfig
from tandem.assembly.digests import digest_inputs
from tandem.assembly.feeds import require_columns, room_to_sample
from tandem.assembly.judging import judge_of, placed_reward_models, score_scales, start_rewards
from tandem.assembly.models import require_engine
from tandem.assembly.placing import Homes
from tandem.assembly.plans import models_used, print_plan
from tandem.assembly.reading import load_data, tokenized
from tandem.assembly.sessions import checked_start
from tandem.assembly.wiring import engine_alone
from tandem.data.chat import set_template
from tandem.data.items import build_prompts
from tandem.models.loading import load_tokenizer
from tandem.models.proof.limits import read_limits
from tandem.roles import Engine
from tandem.rollout.judging import Judge
from tandem.rollout.sampling import Drawing, Sampling
from tandem.runs.folder import SAMPLES, RunFolder
from tandem.runs.lines import append_lines, keep_lots, whole_lots
from tandem.runs.progress import Progress, say
from tandem.types import Group, Prompt, Rollout, Ticket

OF_A_SAMPLE = (
    *("completion", "row", "sample", "stop", "length", "error"),
    *("reward", "reward_parts", "token_ids", "logprobs"),
)
"""What is written of a sample beside the columns of its prompt."""


def sample_rows(config: UseConfig, title: str) -> Path | None:
    """Writes ``samples.jsonl``, a row a sample, into ``--out`` and returns the file; None for a dry run.

    What an earlier start has written stays, in whole lots of prompts. Raises UserError for wrong input, before anything
    slow is loaded, and RunFailure for what ``--resume`` goes on after.
    """
    with ExitStack() as stack:
        return _Sampling(config, title, stack).run()


class _Sampling:
    """One start of such a command. It is made in the order in which a mistake is cheapest to find."""

    def __init__(self, config: UseConfig, title: str, stack: ExitStack) -> None:
        self.config, self.title, self.stack = config, title, stack
        self.out, self.count = Path(config.run.out), config.sampling.samples_per_prompt
        checked_start(config, title)
        require_engine(config.engine)
        config.rewards.overlong(config.sampling.max_new_tokens)
        self.homes = Homes(config.model, config.placement, config.cluster, config.engine, list(config.sources))
        self.homes.check()
        # Begun first, so that it imports the functions while the data is read.
        rewards_of = start_rewards(config.rewards, config.rewards.reward, config.run.out, stack)
        rows = load_data(config.data, "prompts")
        self.tokenizer = load_tokenizer(config.model.source)
        set_template(self.tokenizer, config.data.chat_template)
        room = room_to_sample(config, [read_limits(config.model.source)])
        self.prompts, self.counts = tokenized(build_prompts, rows, self.tokenizer, room)
        score_scales(config.rewards, config.model)
        self.functions = rewards_of()
        require_columns(self.functions, self.prompts, config.data.data)
        inputs = digest_inputs({"data": rows}, self.functions, config.sources, config.data.chat_template)
        self.start = checked_start(config, title, inputs)

    def run(self) -> Path | None:
        if self.config.run.dry_run:
            self._print_plan()
            return None
        path, lots = self.out / SAMPLES, self._lots()
        ends = [lot.stop * self.count for lot in lots]
        missing = not self.config.run.resume or whole_lots(path, ends)[0] < len(lots)
        parts = self._load() if missing else None
        with RunFolder.open(self.start) as folder:
            found = path.stat().st_size if path.exists() else 0
            done = keep_lots(path, ends, "row", [lot.stop - 1 for lot in lots])
            if torn := found - (path.stat().st_size if path.exists() else 0):
                say(f"{path}: {torn} bytes behind the last whole lot of prompts were cut off, and are sampled again")
            folder.event("start", title=self.title, prompts_done=sum(map(len, lots[:done])), **asdict(self.counts))
            if parts is not None:
                self._write(path, lots[done:], *parts)
            folder.event("finish", prompts=len(self.prompts))
        return path

    def _lots(self) -> list[range]:
        """Prompts that are sampled, judged and written together: as many as fill the engines once."""
        engines = max(1, self.config.placement.workers("engine"))
        size = max(1, self.config.sampling.max_slots * engines // self.count)
        return [range(k, min(k + size, len(self.prompts))) for k in range(0, len(self.prompts), size)]

    def _load(self) -> tuple[Engine, Judge]:
        config = self.config
        self.stack.enter_context(self.homes)
        say(f"loading the model from {config.model.model}")
        engine = engine_alone(self.homes, config.sampling, seed=config.run.seed)
        found = placed_reward_models(config.rewards, config.model, self.homes, self.tokenizer)
        return engine, judge_of(config.rewards, [*self.functions, *found], config.sampling.max_new_tokens)

    def _write(self, path: Path, lots: Seq[range], engine: Engine, judge: Judge) -> None:
        """The rows of all prompts of these lots, a lot at a time while the next one is sampled."""
        source = Sampling(
            engine=engine,
            prompts=self.prompts,
            params=self.config.sampling.params,
            samples_per_prompt=self.count,
            judge=judge,
            seed=self.config.run.seed,
        )
        with Progress(self.title, total=len(self.prompts), start=lots[0].start) as progress:
            if lots[0].start:
                progress.note(f"{path}: goes on after {lots[0].start} prompts")
            if taken := sorted({name for prompt in self.prompts for name in prompt.columns} & set(OF_A_SAMPLE)):
                names = ", ".join(taken)
                progress.note(f"data: left out of {path}, where columns of that name are the sample's own: {names}")
            begun: deque[tuple[range, list[Drawing]]] = deque()
            try:
                for lot in lots:
                    # A sample's draws are named after its row, whatever lot it is in.
                    tickets = [Ticket(number=row, row=row, step=0, place=row) for row in lot]
                    begun.append((lot, source.begin(tickets, progress.phase)))
                    while len(begun) > 1 or (begun and lot is lots[-1]):
                        written, drawings = begun.popleft()
                        groups = source.finish(drawings, progress.phase)
                        append_lines(path, self._rows(written, groups, judged=bool(judge.rewards)))
                        progress.update(written.stop)
            except BaseException:  # whatever ends it, what is written stays
                progress.note(f"stopped after {progress.step} of {len(self.prompts)} prompts; go on with --resume")
                raise

    def _rows(self, lot: range, groups: Seq[Group], *, judged: bool) -> Iterable[dict[str, Any]]:
        for row, group in zip(lot, groups, strict=True):
            columns = {name: value for name, value in group.prompt.columns.items() if name not in OF_A_SAMPLE}
            for rollout in group.rollouts:
                yield {"prompt": group.prompt.prompt} | columns | self._sample(group.prompt, rollout, row, judged)

    def _sample(self, prompt: Prompt, rollout: Rollout, row: int, judged: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "completion": prompt.answered(rollout.completion),
            "row": row,
            "sample": rollout.sample_index,
            "stop": rollout.stop,
            "length": len(rollout.completion_ids),
        }
        if rollout.error:
            found["error"] = rollout.error
        if judged:
            found |= {"reward": rollout.reward, "reward_parts": rollout.reward_parts}
        if "tokens" in self.config.written.write:
            found["token_ids"] = rollout.completion_ids
        if "logprobs" in self.config.written.write:
            found["logprobs"] = rollout.untruncated_logp[rollout.prompt_length :]
        return found

    def _print_plan(self) -> None:
        """What a dry run shows: the resolved config and what would be used."""
        config = self.config
        uses = models_used(config, config.rewards.models) | {
            "rewards": ", ".join(config.rewards.judges) or "none",
            "engine": f"{config.engine.kind}, {config.sampling.max_slots} slots",
            "prompts": str(self.counts),
            "samples": f"{self.count * len(self.prompts)} of at most {config.sampling.max_new_tokens} tokens",
        }
        print_plan(config, uses)
