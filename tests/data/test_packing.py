"""Packing keeps every token at its place, and the stamped weights are the three means they claim to be."""

from dataclasses import replace

import pytest
import torch
from helpers.models import micro_batches

from tandem.batch import Outputs
from tandem.data.packing import pack, pack_pairs, pack_rollouts, stamp_unit_weights, stamp_weights
from tandem.types import PreferencePair, Rollout, Sequence

SEQUENCES = [
    Sequence(token_ids=[5, 6, 7], trainable=[True, True, True]),
    Sequence(token_ids=[8], trainable=[True]),
    Sequence(token_ids=[9, 10, 11, 12], trainable=[False, False, True, False]),
]


def test_layout():
    batch = pack(SEQUENCES)
    assert batch.bounds.tolist() == [0, 3, 4, 8]
    assert batch.token_ids_T.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert batch.position_T.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    # A first token has nothing before it to be predicted from.
    assert batch.trainable_T.tolist() == [False, True, True, False, False, False, True, False]
    assert batch.segment_T.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert batch.last_S.tolist() == [2, 3, 7]


@pytest.mark.parametrize("lengths", [[1, 1], [1, 1, 1, 1]])
def test_prompt_lengths_of_other_sequences_are_refused(lengths):
    with pytest.raises(ValueError, match="zip"):
        pack(SEQUENCES, prompt_lengths=lengths)


def test_select_and_split_keep_every_field_together():
    rollouts = [
        Rollout(
            prompt_id="p",
            sample_index=i,
            token_ids=list(range(10 * i, 10 * i + n)),
            prompt_length=1,
            trainable=[False] + [True] * (n - 1),
            behaviour_logp=[0.0] * n,
            untruncated_logp=[float(100 * i + t) for t in range(n)],
            stop="eos",
            reward=float(i),
        )
        for i, n in enumerate((3, 5, 2, 4))
    ]
    batch = pack_rollouts(rollouts)
    batch = replace(batch, seen={"critic": Outputs(scalar_T=batch.untruncated_logp_T + 0.5)})
    chosen = batch.select([3, 0])
    assert chosen.token_ids_T.tolist() == [30, 31, 32, 33, 0, 1, 2]
    assert chosen.untruncated_logp_T.tolist() == [300, 301, 302, 303, 0, 1, 2]
    assert chosen.seen["critic"].scalar_T.tolist() == [300.5, 301.5, 302.5, 303.5, 0.5, 1.5, 2.5]
    assert chosen.seen["critic"].logp_T is None
    # A value is the head's number one token before; a score, that at a segment's end.
    assert chosen.values_by("critic").tolist() == [0, 300.5, 301.5, 302.5, 0, 0.5, 1.5]
    assert chosen.scores(chosen.seen["critic"]).tolist() == [303.5, 2.5]
    assert chosen.reward_S.tolist() == [3.0, 0.0]
    assert chosen.index_S.tolist() == [3, 0]
    assert chosen.bounds.tolist() == [0, 4, 7]
    assert [micro.lengths for micro in micro_batches(batch, 7)] == [[3], [5, 2], [4]]
    # A sequence longer than the budget stands alone rather than being cut or lost.
    assert [micro.lengths for micro in micro_batches(batch, 1)] == [[3], [5], [2], [4]]
    joined = torch.cat([micro.token_ids_T for micro in micro_batches(batch, 8)])
    assert torch.equal(joined, batch.token_ids_T)


def test_weights_are_the_three_means():
    batch = pack(SEQUENCES)
    value_T = torch.tensor([9.0, 1.0, 3.0, 9.0, 9.0, 9.0, 8.0, 9.0])
    # Trainable: 1 and 3 in the first sequence, 8 in the third, none in the second.
    token = (value_T * stamp_weights(batch, "token").weight_T).sum()
    sequence = (value_T * stamp_weights(batch, "sequence").weight_T).sum()
    constant = (value_T * stamp_weights(batch, "constant", constant_length=10).weight_T).sum()
    assert token.item() == pytest.approx((1 + 3 + 8) / 3)
    assert sequence.item() == pytest.approx(((1 + 3) / 2 + 8) / 2)
    assert constant.item() == pytest.approx((1 + 3 + 8) / (2 * 10))


def test_pairs_stay_together():
    pairs = [
        PreferencePair(
            chosen=Sequence(token_ids=[1] * (i + 2), trainable=[True] * (i + 2)),
            rejected=Sequence(token_ids=[2] * 3, trainable=[True] * 3),
            margin=float(i),
        )
        for i in range(3)
    ]
    batch = stamp_unit_weights(pack_pairs(pairs))
    assert (batch.segments, batch.units) == (6, 3)
    assert batch.weight_T.sum().item() == pytest.approx(1.0)
    assert batch.weight_T.nonzero().squeeze(-1).tolist() == batch.last_S[::2].tolist()
    for micro in micro_batches(batch, 1):
        assert micro.segments == 2
        assert micro.token_ids_T[0] == 1
        assert micro.token_ids_T[-1] == 2
    assert batch.select([2]).margin_S.tolist() == [2.0, 2.0]
    # Both answers are of one row, and each is a segment of what an optimizer step sees.
    assert batch.index_S.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.share_S.tolist() == pytest.approx([1 / 6] * 6)


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="no trainable token"):
        stamp_weights(pack([Sequence(token_ids=[1, 2], trainable=[True, False])]), "token")
    with pytest.raises(ValueError, match="sequence 1: 2 tokens with a mask of 1"):
        pack([SEQUENCES[0], Sequence(token_ids=[1, 2], trainable=[True])])


def test_log_probs_of_all_or_of_none():
    def sampled(*logp):
        return Sequence(token_ids=[1, 2], trainable=[False, True], untruncated_logp=list(logp))

    unknown = pack([sampled(0.0, -1.5), sampled(0.0, float("nan"))]).untruncated_logp_T
    assert unknown[:3].tolist() == [0.0, -1.5, 0.0]
    assert unknown[3].isnan()
    for others, said in [
        (SEQUENCES[0], "1 of 2 sequences have no untruncated_logp"),
        (sampled(0.0, None), "sequence 1: token 1 has an untruncated_logp of None"),
        (sampled(0.0), "sequence 1: 2 tokens with 1 of untruncated_logp"),
    ]:
        with pytest.raises(ValueError, match=said):
            pack([sampled(0.0, -1.5), others])
