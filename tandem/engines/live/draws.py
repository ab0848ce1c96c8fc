"""Draws one token a row from logits, each row with its own parameters and its own stream of random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.engines.live.sample import Sample
from tandem.kernels.available import on_triton
from tandem.kernels.draw import block_size
from tandem.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What any of a call's samples asks of the draws. Work that none asks for is not done."""

    scaled: bool
    greedy: bool
    max_top_k: int
    top_p: bool
    min_p: bool

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> Wanted:
        """What these ask for together."""
        distinct = set(params)
        return cls(
            scaled=any(p.temperature not in (0, 1) for p in distinct),
            greedy=any(p.temperature == 0 for p in distinct),
            max_top_k=max((p.top_k for p in distinct), default=0),
            top_p=any(p.top_p < 1 for p in distinct),
            min_p=any(p.min_p > 0 for p in distinct),
        )

    @property
    def truncates(self) -> bool:
        """Whether behaviour and untruncated log-probs may differ."""
        return bool(self.max_top_k or self.top_p or self.min_p)


def param_columns(params: Iterable[SamplingParams]) -> Tensor:
    """float64 [5, N]: temperature (1 where greedy), whether greedy, top_k, top_p, min_p."""
    table = [[p.temperature or 1.0, float(p.temperature == 0), p.top_k, p.top_p, p.min_p] for p in params]
    return torch.tensor(table, dtype=torch.float64).view(len(table), 5).T.contiguous()


class Kinds:
    """The different sampling parameters of samples that are drawn side by side, and what they ask for together."""

    def __init__(self) -> None:
        self.numbers: dict[SamplingParams, int] = {}
        self.columns_5K = param_columns(())
        """``param_columns`` of each kind, by its number."""
        self.wanted = Wanted.of(())

    def add(self, samples: Seq[Sample]) -> None:
        """Gives every sample its ``kind``."""
        for sample in samples:
            sample.kind = self.numbers.setdefault(sample.asked.request.sampling, len(self.numbers))
        if len(self.numbers) > self.columns_5K.shape[1]:
            self.columns_5K, self.wanted = param_columns(self.numbers), Wanted.of(self.numbers)

    def columns(self, samples: Seq[Sample]) -> tuple[Tensor, Tensor]:
        """The samples' seeds, int64 [N], and parameters, float64 [5, N], on the CPU."""
        seed_N, kind_N = torch.tensor([(s.seed, s.kind) for s in samples], dtype=torch.int64).view(-1, 2).T
        return seed_N.contiguous(), self.columns_5K[:, kind_N]


def draw(logits_BV: Tensor, seed_B: Tensor, params_5B: Tensor, drawn_B: Tensor, wanted: Wanted) -> Tensor:
    """One token a row: number ``drawn`` (int64) of the stream of ``seed`` (int64) under ``params`` (``param_columns``).

    Returns float64 [3, B], one tensor so that the host asks the device once: token, behaviour log-prob, untruncated
    log-prob (in nats; NaN where the logits are not finite).
    """
    temperature_B, greedy_B = params_5B[0], params_5B[1] > 0
    if on_triton(logits_BV) and not wanted.truncates:
        from tandem.kernels import draw_triton

        return draw_triton.draw(logits_BV, temperature_B, params_5B[1], seed_B, drawn_B, any_greedy=wanted.greedy)
    logits_BV = logits_BV.float()
    if wanted.scaled:
        logits_BV = logits_BV / temperature_B[:, None].float()
    prob_BV = torch.softmax(logits_BV, dim=-1)
    kept_BV = _truncate(prob_BV, params_5B, wanted) if wanted.truncates else prob_BV
    token_B, mass_B = race(kept_BV, stream(seed_B, drawn_B))
    if wanted.greedy:
        token_B = torch.where(greedy_B, logits_BV.argmax(dim=-1), token_B)
    untruncated_B = prob_BV.gather(1, token_B[:, None]).squeeze(1).double().log()
    behaviour_B = untruncated_B - mass_B.log() if wanted.truncates else untruncated_B
    if wanted.greedy:
        # A product, so that NaN stays NaN.
        behaviour_B = behaviour_B * ~greedy_B
    return torch.stack((token_B.double(), behaviour_B, untruncated_B))


def _truncate(prob_BV: Tensor, params_5B: Tensor, wanted: Wanted) -> Tensor:
    """Zeros outside top-k, then top-p, then min-p, each a threshold on the probability; ties are kept.

    Top-p (Holtzman et al., arXiv:1904.09751) counts mass among what top-k left; min-p is arXiv:2407.01082.
    """
    top_k_B, top_p_B, min_p_B = params_5B[2].long(), params_5B[3], params_5B[4]
    least_B = prob_BV.new_zeros(len(prob_BV))
    if wanted.max_top_k or wanted.top_p:
        vocabulary = prob_BV.shape[1]
        depth = vocabulary if wanted.top_p else min(wanted.max_top_k, vocabulary)
        sorted_BK = prob_BV.topk(depth, dim=1).values if depth < vocabulary else prob_BV.sort(descending=True)[0]
        kth_B = sorted_BK.gather(1, (top_k_B - 1).clamp(0, depth - 1)[:, None]).squeeze(1)
        least_B = torch.where(top_k_B > 0, kth_B, least_B)
        if wanted.top_p:
            sorted_BK = sorted_BK.double() * (sorted_BK >= least_B[:, None])
            before_BK = sorted_BK.cumsum(dim=1) - sorted_BK
            nucleus_B = (before_BK < (top_p_B * sorted_BK.sum(dim=1))[:, None]).sum(dim=1)
            edge_B = sorted_BK.gather(1, (nucleus_B - 1).clamp(min=0)[:, None]).squeeze(1).float()
            least_B = torch.where(top_p_B < 1, torch.maximum(least_B, edge_B), least_B)
    if wanted.min_p:
        least_B = torch.maximum(least_B, prob_BV.amax(dim=1) * min_p_B.float())
    return prob_BV * (prob_BV >= least_B[:, None])


def race(weight_BV: Tensor, stream_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draws index i with probability ``weight[i] / sum(weight)``: int64 [B], and the sums, float64 [B].

    ``weight_BV`` is float32 and not negative. Of waiting times ``E_i / weight[i]``, where each ``E_i`` is exponential
    with mean 1 and ``-log E_i`` is Gumbel's noise, index i's is the shortest with that probability (the Gumbel-max
    trick: Maddison et al., arXiv:1411.0030, eq. 3 to 5). Blocks race with their sums, then the indices of the block
    that won, so that few numbers are drawn for a large vocabulary. A weight that is off by rounding
    changes a draw where two times are that close, whatever the other weights are; where a uniform number is looked up
    among cumulative sums, each weight moves the edges of all that follow. An index of weight 0 is never drawn.
    """
    rows, vocabulary = weight_BV.shape
    size = min(block_size(vocabulary), vocabulary)
    if vocabulary % size:
        weight_BV = F.pad(weight_BV, (0, -vocabulary % size))
    weight_BNK = weight_BV.view(rows, -1, size)
    device = weight_BV.device
    sum_BN = weight_BNK.sum(dim=-1).double()
    blocks = sum_BN.shape[1]
    wait_BN, wait_BK = waiting(stream_B, torch.arange(blocks + size, device=device)).split([blocks, size], dim=1)
    if blocks == 1:
        return (weight_BV / wait_BK).argmax(dim=1), sum_BN[:, 0]
    block_B = (sum_BN / wait_BN).argmax(dim=1)
    inside_B = (weight_BNK[torch.arange(rows, device=device), block_B] / wait_BK).argmax(dim=1)
    # For rows of NaN, which the caller reports: they must not index out of bounds before that.
    return (block_B * size + inside_B).clamp(max=vocabulary - 1), sum_BN.sum(dim=1)


def stream(seed_B: Tensor, counter_B: Tensor) -> Tensor:
    """Where the numbers of draw ``counter`` of the stream of ``seed`` begin, all int64 [B].

    SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014, fig. 16), started at
    a mixed seed so that neighbouring seeds have unrelated streams. Each draw has one of its own in turn.
    """
    return _mix_(_mix_(seed_B + _GAMMA) + _GAMMA * (counter_B + 1))


def waiting(stream_B: Tensor, number_N: Tensor) -> Tensor:
    """Numbers ``number`` (int64) of the draws that begin at ``stream``: exponential, float64 [B, N].

    ``-log u`` with u of 52 random bits and a half, in (0, 1): each between 1.1e-16 and 36.8.
    """
    bits_BN = _shift_right(_mix_(stream_B[:, None] + _GAMMA * (number_N + 1)), 12)
    return bits_BN.double().add_(0.5).mul_(2.0**-52).log_().neg_()


def _signed(x: int) -> int:
    return x - (1 << 64)


# torch has no unsigned 64-bit arithmetic; two's complement wraps to the same bits.
_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix_(z: Tensor) -> Tensor:
    """In place: there may be many."""
    z.bitwise_xor_(_shift_right(z, 30)).mul_(_MIX_1)
    z.bitwise_xor_(_shift_right(z, 27)).mul_(_MIX_2)
    return z.bitwise_xor_(_shift_right(z, 31))


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
