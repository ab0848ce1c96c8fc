"""Sequences into a packed ``Batch``, and the weights that make one sum the right mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tandem.batch import Batch, positions
from tandem.types import Aggregation, Example, LabelledAnswer, PreferencePair, Rollout, Sequence, Solution

WORTH_SHARING = 32
"""A prompt goes through a model once for several sequences where it is at least one in 32 of their tokens, and
more than a token that all begin with."""


def pack(sequences: Seq[Sequence], *, segments_per_unit: int = 1, prompt_lengths: Seq[int] | None = None) -> Batch:
    """Packs sequences end to end, without padding.

    ``untruncated_logp_T`` is filled where they are sampled ones. Raises ValueError where one is empty, its mask or its
    log-probs do not fit, a log-prob is None (NaN stands for one that nobody knows), or some only have any.
    Sequences with the same prompt (None: what is before the first trainable token) are a group of ``Batch.group_S``.
    """
    if not sequences:
        raise ValueError("nothing to pack")
    for i, s in enumerate(sequences):
        if not s.token_ids or len(s.token_ids) != len(s.trainable):
            raise ValueError(f"sequence {i}: {len(s.token_ids)} tokens with a mask of {len(s.trainable)}")
    lengths = torch.tensor([len(s.token_ids) for s in sequences])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    count, position_T = int(bounds[-1]), positions(lengths)
    token_ids_T = _joined((s.token_ids for s in sequences), np.int64, count)
    trainable_T = _joined((s.trainable for s in sequences), np.bool_, count) & (position_T > 0)
    if prompt_lengths is None:
        prompt_lengths = [s.trainable.index(True) if any(s.trainable) else len(s.trainable) for s in sequences]
    group_S, prefix_S = _groups(token_ids_T, bounds, prompt_lengths)
    return Batch(
        bounds=bounds,
        token_ids_T=token_ids_T,
        position_T=position_T,
        trainable_T=trainable_T,
        weight_T=torch.zeros(count, dtype=torch.float32),
        untruncated_logp_T=_sampled(sequences, count),
        segments_per_unit=segments_per_unit,
        index_S=torch.arange(len(sequences)),
        group_S=group_S,
        prefix_S=prefix_S,
    )


def _joined(lists: Iterable[Seq[float]], dtype: type[np.generic], count: int) -> Tensor:
    """The ``count`` numbers of all lists, one after another, in a seventh of the time that ``torch.tensor`` takes."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), dtype, count))


def _sampled(sequences: Seq[Sequence], count: int) -> Tensor | None:
    """The log-probs that they were sampled with; None where they were not. Raises ValueError as ``pack``."""
    given = [s.untruncated_logp for s in sequences if s.untruncated_logp is not None]
    if not given:
        return None
    if len(given) < len(sequences):
        raise ValueError(f"{len(sequences) - len(given)} of {len(sequences)} sequences have no untruncated_logp")
    for i, (s, logp) in enumerate(zip(sequences, given, strict=True)):
        if len(logp) != len(s.token_ids):
            raise ValueError(f"sequence {i}: {len(s.token_ids)} tokens with {len(logp)} of untruncated_logp")
    logp_T = _joined(given, np.float32, count)
    if logp_T.isnan().any():  # which numpy makes of None
        for i, logp in enumerate(given):
            if None in logp:
                raise ValueError(
                    f"sequence {i}: token {[x is None for x in logp].index(True)} has an untruncated_logp of None"
                )
    return logp_T


def _groups(token_ids_T: Tensor, bounds: Tensor, prompt_lengths: Seq[int]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """``group_S`` and ``prefix_S``; None where nothing is shared.

    The tokens decide, so that what is shared is the same whoever named it.
    """
    groups: dict[object, int] = {}
    numbers, prefixes = [], []
    ids_T, starts = token_ids_T.numpy(), bounds.tolist()
    for i, (start, end, prompt_length) in enumerate(zip(starts[:-1], starts[1:], prompt_lengths, strict=True)):
        length = end - start
        prefix = min(prompt_length, length - 1)
        if prefix == 1 or prefix * WORTH_SHARING < length:
            prefix = 0
        key = ids_T[start : start + prefix].tobytes() if prefix else i
        numbers.append(groups.setdefault(key, len(groups)))
        prefixes.append(prefix)
    return (torch.tensor(numbers), torch.tensor(prefixes)) if len(groups) < len(numbers) else (None, None)


def pack_rollouts(rollouts: Seq[Rollout]) -> Batch:
    """Packs rollouts with their untruncated sampling log-probs and rewards."""
    sequences = [
        Sequence(token_ids=r.token_ids, trainable=r.trainable, untruncated_logp=r.untruncated_logp) for r in rollouts
    ]
    batch = pack(sequences, prompt_lengths=[r.prompt_length for r in rollouts])
    rewards = [0.0 if r.reward is None else r.reward for r in rollouts]
    return replace(batch, reward_S=torch.tensor(rewards, dtype=torch.float32))


def pack_pairs(pairs: Seq[PreferencePair]) -> Batch:
    """Packs preference pairs: segments ``2i`` (chosen) and ``2i + 1`` (rejected) stay together."""
    batch = pack([s for pair in pairs for s in (pair.chosen, pair.rejected)], segments_per_unit=2)
    margin_S = torch.tensor([pair.margin for pair in pairs for _ in range(2)], dtype=torch.float32)
    return replace(batch, margin_S=margin_S, index_S=torch.arange(len(pairs)).repeat_interleave(2))


def pack_labelled(answers: Seq[LabelledAnswer]) -> Batch:
    """Packs labelled answers, a segment each."""
    batch = pack([labelled.answer for labelled in answers])
    return replace(batch, desirable_S=torch.tensor([labelled.desirable for labelled in answers]))


def pack_solutions(solutions: Seq[Solution]) -> Batch:
    """Packs solutions, a segment each."""
    prompts = [solution.prompt_length for solution in solutions]
    batch = pack([solution.text for solution in solutions], prompt_lengths=prompts)
    labels = torch.tensor([label for solution in solutions for label in solution.labels], dtype=torch.float32)
    label_T = torch.zeros(batch.tokens).masked_scatter(batch.trainable_T, labels)
    return replace(batch, label_T=label_T)


def pack_examples(examples: Seq[Example]) -> Batch:
    """Packs what a method trains on, all of one kind: rollouts, sequences, pairs, labelled answers or solutions."""
    packers: dict[type, Callable[..., Batch]] = {
        Rollout: pack_rollouts,
        PreferencePair: pack_pairs,
        LabelledAnswer: pack_labelled,
        Solution: pack_solutions,
    }
    return packers.get(type(examples[0]), pack)(examples)


def stamp(batch: Batch, aggregation: Aggregation, *, constant_length: int | None = None) -> Batch:
    """Stamps ``weight_T``: one for each pair or labelled answer (``stamp_unit_weights``), or as ``stamp_weights``."""
    if batch.segments_per_unit == 2 or batch.desirable_S is not None:
        return stamp_unit_weights(batch)
    return stamp_weights(batch, aggregation, constant_length=constant_length)


def stamp_weights(batch: Batch, aggregation: Aggregation, *, constant_length: int | None = None) -> Batch:
    """Stamps ``weight_T`` for everything that one optimizer step sees.

    - ``token``: 1 / N with N trainable tokens: the mean over tokens (DAPO, arXiv:2503.14476, eq. 8).
    - ``sequence``: 1 / (S n_s): the mean over sequences of their token means (GRPO, arXiv:2402.03300, eq. 3).
    - ``constant``: 1 / (S L) with a fixed ``constant_length`` L (Dr.GRPO, arXiv:2503.20783).

    Sequences without a trainable token do not count. Raises ValueError where nothing is trainable.
    """
    mask_T = batch.trainable_T.float()
    segment_T = batch.segment_T
    count_S = torch.zeros(batch.segments, device=mask_T.device).index_add_(0, segment_T, mask_T)
    sequences = int((count_S > 0).sum())
    if sequences == 0:
        raise ValueError("the batch has no trainable token")
    if aggregation == "token":
        weight_T = mask_T / mask_T.sum()
    elif aggregation == "sequence":
        weight_T = mask_T / (sequences * count_S.clamp(min=1))[segment_T]
    elif aggregation == "constant":
        if not constant_length:
            raise ValueError("aggregation 'constant' needs constant_length")
        weight_T = mask_T / (sequences * constant_length)
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}: token, sequence or constant")
    return replace(batch, weight_T=weight_T, share_S=_share_S(batch))


def stamp_unit_weights(batch: Batch) -> Batch:
    """One over the number of units where their losses are put: at the last token of each one's first segment."""
    weight_T = torch.zeros_like(batch.weight_T)
    weight_T[batch.last_S[:: batch.segments_per_unit]] = 1.0 / batch.units
    return replace(batch, weight_T=weight_T, share_S=_share_S(batch))


def _share_S(batch: Batch) -> Tensor:
    return torch.full((batch.segments,), 1.0 / batch.segments, device=batch.weight_T.device)
