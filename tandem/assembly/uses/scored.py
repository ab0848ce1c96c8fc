"""Answers that are there already, through the rewards into a file of rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from tandem.assembly.configs.sections import EngineSection
from tandem.assembly.configs.uses import ScoreConfig
from tandem.assembly.digests import digest_inputs
from tandem.assembly.feeds import require_columns
from tandem.assembly.judging import judge_of, placed_reward_models, score_scales, start_rewards
from tandem.assembly.placing import Homes
from tandem.assembly.plans import print_plan
from tandem.assembly.reading import of_kind
from tandem.assembly.sessions import checked_start
from tandem.assembly.uses.sampled import OF_A_SAMPLE
from tandem.batch import cut
from tandem.data import formats
from tandem.data.columns import shape
from tandem.data.order import content_hash
from tandem.data.rows import Dataset, load_rows
from tandem.data.tokenize import encode
from tandem.errors import UserError
from tandem.models.loading import load_tokenizer
from tandem.roles import Reward
from tandem.runs.folder import SCORED, RunFolder
from tandem.runs.lines import append_lines, iterate_lines, keep_lots, whole_lots
from tandem.runs.progress import Progress
from tandem.seeds import derive_seed
from tandem.types import Group, Message, Prompt, Rollout, StopReason

LOT = 256
"""At most 256 rows, whole prompts of them, are judged and written together; more where one prompt alone has more."""
ADDED = {
    "completion": ("reward", "reward_parts"),
    "chosen": ("chosen_reward", "chosen_reward_parts"),
    "rejected": ("rejected_reward", "rejected_reward_parts"),
}
"""By the column of an answer, the columns of its judgement."""
STOPS = get_args(StopReason)
"""How an answer may have ended, as ``tandem generate`` writes it."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    """Neighboring rows of one prompt, and their answers as samples of it."""

    rows: range
    group: Group


def score_rows(config: ScoreConfig) -> Path | None:
    """Writes ``scored.jsonl``, a row for each row of ``--data``, into ``--out``; the file, or None for a dry run.

    What an earlier start has written stays, in whole lots. Raises UserError for wrong input, before anything slow is
    loaded, and RunFailure for what ``--resume`` goes on after.
    """
    out = Path(config.run.out)
    with ExitStack() as stack:
        checked_start(config, "score")
        homes = Homes(config.model, config.placement, config.cluster, EngineSection(), list(config.sources))
        homes.check()
        rewards_of = start_rewards(config.reward, config.reward.reward, config.run.out, stack)
        rows, answers = _read(config)
        tokenizer = load_tokenizer(config.model.source) if config.model.model else None
        items = list(_items(rows, answers, tokenizer))
        functions = rewards_of()
        require_columns(functions, [item.group.prompt for item in items], config.data.data)
        if any(function.names("completion_ids") for function in functions) and not all(
            rollout.token_ids for item in items for rollout in item.group.rollouts
        ):
            raise UserError("model: a reward names 'completion_ids', and not all rows have token_ids; give --model")
        score_scales(config.reward, config.model)
        start = checked_start(config, "score", digest_inputs({"data": rows}, functions, config.sources))
        if config.run.dry_run:
            judges = ", ".join(config.reward.judges)
            print_plan(config, {"data": f"{len(rows)} rows, {len(items)} prompts", "rewards": judges})
            return None
        lots = [[items[i] for i in lot] for lot in cut([len(item.rows) for item in items], LOT)]
        ends = [lot[-1].rows.stop for lot in lots]
        path = out / SCORED
        rewards: list[Reward] = list(functions)
        missing = not config.run.resume or whole_lots(path, ends)[0] < len(lots)
        if config.reward.reward_model and missing:
            stack.enter_context(homes)
            rewards += placed_reward_models(config.reward, config.model, homes)
        with RunFolder.open(start) as folder, Progress("score", total=len(rows)) as progress:
            done = keep_lots(path, ends, answers[0], [rows[end - 1][answers[0]] for end in ends])
            folder.event("start", title="score", rows_done=ends[done - 1] if done else 0)
            for number, lot in enumerate(lots[done:], start=done):
                with progress.phase("scoring"):
                    judge = judge_of(config.reward, rewards)
                    judge.fill([item.group for item in lot], derive_seed(config.run.seed, "judge", number))
                append_lines(path, [row for item in lot for row in _judged(rows, item, answers)])
                progress.update(ends[number])
            folder.event("finish", rows=len(rows))
    return path


def summary(path: Path) -> dict[str, float]:
    """Of scored rows: the mean of each kind of reward, and how many rows are ``unjudged``, without a reward.

    Of preferences also the ``accuracy``: the share of pairs whose chosen answer has more, without the ``ties``.
    """
    kinds = [name for name, _ in ADDED.values()]
    rows = [{kind: row[kind] for kind in kinds if kind in row} for row in iterate_lines(path)]
    judged = [row for row in rows if None not in row.values()]
    pairs = [row["chosen_reward"] - row["rejected_reward"] for row in judged if "chosen_reward" in row]
    apart = [gap > 0 for gap in pairs if gap]
    found: dict[str, float] = {"accuracy": statistics.fmean(apart)} if apart else {}
    found |= {"ties": len(pairs) - len(apart)} if "chosen_reward" in rows[0] else {}
    found |= {kind: statistics.fmean(row[kind] for row in judged) for kind in (judged[0] if judged else ())}
    return found | {"unjudged": len(rows) - len(judged)}


def _read(config: ScoreConfig) -> tuple[Dataset, tuple[str, ...]]:
    """The rows, and which of their columns are answers."""
    data = config.data
    rows = load_rows(data.data, split=data.split, max_samples=data.max_samples)
    paired = data.chosen_key is not None or rows[0].get("chosen") is not None
    kind = "preferences" if paired else "demonstrations"
    shaped = of_kind(shape(rows, data, kind), kind)
    return shaped, ("chosen", "rejected") if paired else ("completion",)


def _items(rows: Dataset, answers: tuple[str, ...], tokenizer: Any) -> Iterator[_Item]:
    judged = {name for names in ADDED.values() for name in names}

    def columns_of_prompt(index: int) -> dict[str, Any]:
        row = rows[index]
        # The rows of 'tandem generate' have columns that are each a sample's own.
        own = OF_A_SAMPLE if {"row", "sample"} <= row.keys() else ()
        return {name: value for name, value in row.items() if name not in {"prompt", *answers, *judged, *own}}

    def asked(index: int) -> tuple[str, str]:
        return content_hash(_parts(rows, index, answers)[0]), content_hash(columns_of_prompt(index))

    for (prompt_id, _), run in groupby(range(len(rows)), asked):
        indices = list(run)
        # The answers of a preference are a group of their own, whatever stands beside it.
        for some in [[index] for index in indices] if len(answers) > 1 else [indices]:
            content = _parts(rows, some[0], answers)[0]
            prompt = Prompt(prompt_id=prompt_id, prompt=content, token_ids=(), columns=columns_of_prompt(some[0]))
            texts = [(index, text) for index in some for text in _parts(rows, index, answers)[1]]
            rollouts = []
            for n, (index, text) in enumerate(texts):
                with rows.at(index) as row:
                    rollouts.append(_rollout(prompt_id, n, text, row, tokenizer))
            yield _Item(rows=range(some[0], some[-1] + 1), group=Group(prompt=prompt, rollouts=rollouts))


def _parts(rows: Dataset, index: int, answers: tuple[str, ...]) -> tuple[formats.Content, list[str]]:
    """The prompt of a row, and the texts of its answers."""
    with rows.at(index) as row:
        prompt, *found = formats.preference(row) if len(answers) > 1 else formats.prompt_completion(row)
        return prompt, [_text(answer, column) for answer, column in zip(found, answers, strict=True)]


def _text(answer: str | list[Message], column: str) -> str:
    if isinstance(answer, str):
        return answer
    if len(answer) != 1 or answer[0]["role"] != "assistant" or not isinstance(answer[0].get("content"), str):
        raise UserError(f"column {column!r} must be text or one message of the assistant, whose content is text")
    text: str = answer[0]["content"]
    return text


def _rollout(prompt_id: str, number: int, text: str, row: Mapping[str, Any], tokenizer: Any) -> Rollout:
    """Raises UserError where the row's own ``token_ids`` or ``stop`` are none."""
    known, stop = row.get("token_ids"), row.get("stop")
    if known is not None and not (isinstance(known, list) and all(type(token) is int for token in known)):
        raise UserError(f"column 'token_ids' must be a list of whole numbers, not {known!r:.60}")
    if stop is not None and stop not in STOPS:
        raise UserError(f"column 'stop' says how an answer ended, {', '.join(STOPS)}, not {stop!r:.60}")
    ids = known or (encode(text, tokenizer, special_tokens=False) if tokenizer is not None else [])
    return Rollout.of_answer(prompt_id, number, stop or "eos", text, ids)


def _judged(rows: Dataset, item: _Item, answers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    rollouts = iter(item.group.rollouts)
    for index in item.rows:
        added: dict[str, Any] = {}
        for column in answers:
            rollout = next(rollouts)
            added |= dict(zip(ADDED[column], (rollout.reward, rollout.reward_parts), strict=True))
        yield {**rows[index], **added}
