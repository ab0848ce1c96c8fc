"""Requests of every kind, and what an engine makes of them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from helpers.engine_models import VOCABULARY
from tandem.engines.live.forwards import OwnForward
from tandem.engines.live.pages import PAGE
from tandem.models.attention import Ask, PackedLayout
from tandem.types import Completion, Request, SamplingParams

Drawn = list[list[tuple[list[int], str, str]]]


def mixed_requests(count: int = 7) -> list[Request]:
    """Prompts below, at and above a page; one to five samples of each; lengths and ends of all kinds."""
    rng = random.Random(3)
    kinds = [
        SamplingParams(max_new_tokens=40),
        SamplingParams(max_new_tokens=55, temperature=0.8, stop=("e", "zq")),
        SamplingParams(max_new_tokens=5, stop_token_ids=(40, 41)),
        SamplingParams(max_new_tokens=60, temperature=0),
        SamplingParams(max_new_tokens=1),
    ]
    lengths = [3, PAGE, PAGE - 1, PAGE + 1, 20, 50, 10]
    return [
        Request(
            prompt_ids=tuple(rng.randrange(2, VOCABULARY) for _ in range(lengths[i % 7])),
            seeds=tuple(10 * i + j for j in range(1 + i % 5)),
            sampling=kinds[i % len(kinds)],
        )
        for i in range(count)
    ]


def drawn(completions: list[list[Completion]]) -> Drawn:
    return [[(c.token_ids, c.stop, c.text) for c in cs] for cs in completions]


class Rounded(PackedLayout):
    """Attention in which the tokens after the prompt see all keys and values rounded to e4m3, head by head."""

    prompt = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        exact = super().attend(query, key, value, ask)
        scales = [x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448 for x in (key, value)]
        low = [
            (x / scale).to(torch.float8_e4m3fn).float() * scale for x, scale in zip((key, value), scales, strict=True)
        ]
        rounded = super().attend(query, *low, ask)
        return torch.cat((exact[:, : self.prompt], rounded[:, self.prompt :]), dim=1)


def gap(module: Any, request: Request, completion: Completion, kind: type[PackedLayout] = PackedLayout) -> Tensor:
    """|log-prob of the sampler - of the module's forward| for each sampled token."""
    ids = torch.tensor([*request.prompt_ids, *completion.token_ids])
    first = len(request.prompt_ids)
    layout = kind(torch.tensor([0, len(ids)]), ids.device)
    if isinstance(layout, Rounded):
        layout.prompt = first
    with torch.no_grad():
        logits_1TV = OwnForward(module)(ids[None], torch.arange(len(ids))[None], layout)
    truth = logits_1TV[0].log_softmax(-1)[first - 1 : -1].gather(1, ids[first:, None])[:, 0]
    return (truth - torch.tensor(completion.untruncated_logp)).abs()
