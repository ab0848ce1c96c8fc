"""A few tokens go through a module: the calls that they make are written down, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tandem.engines.live.deltas import read_delta
from tandem.engines.live.layers import Layer, Unlike
from tandem.engines.live.mixers import Mixer
from tandem.engines.live.reading.calls import Attended, Call, call_of
from tandem.engines.live.reading.comparing import same
from tandem.engines.live.reading.rotations import Rotations
from tandem.models.attention import Ask, PackedLayout, UnsupportedAttention, no_mask
from tandem.models.proof.limits import turning_point
from tandem.models.recurrent.states import Mixers, cache_argument

POSITIONS = (0, 1, 2, 3, 5, 9, 17, 33)
"""Of the tokens that are watched, and the last that there is."""


class Watch(PackedLayout):
    """Writes down the calls that a few tokens make, and reads each layer when it has been called."""

    def __init__(
        self, base: Any, blocks: nn.ModuleList, positions: int, mixers: Mixers, read: Callable[[Watch, Call], Layer]
    ) -> None:
        self.base, self.blocks, self.mixers, self.read = base, blocks, mixers, read
        self.carrying = {part: Mixer(part, cache_argument(part)) for part in mixers.parts}
        self.deltas = {part: read_delta(part) for part in mixers.parts}
        self.device = base.get_input_embeddings().weight.device
        places = [p for p in POSITIONS if p < positions - 1] + [positions - 1]
        self.position_T = torch.tensor(places).to(self.device)
        super().__init__(torch.tensor([0, len(places)]), self.device)
        self.outside: list[Call] = []
        self.inside: list[Call | Attended] = []
        self.layers: list[Layer] = []
        self.attended: list[Attended] = []
        """So far: layers without attention keep no keys and values, and have no number among those that do."""
        self.given: list[Tensor] = []
        """What layers were given beside what goes through, [T, P] each."""
        self.rotations = Rotations(positions, self.position_T, turning_point(base.config))
        self.query_scale_P = query_scale(base.config, positions, self.device)
        self.first = self.last = self.result = torch.empty(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, ask: Ask) -> Tensor:
        out = super().attend(query, key, value, ask)
        self.attended.append(Attended(query, key, value, out, ask._replace(layer=len(self.attended))))
        self.inside.append(self.attended[-1])
        return out

    def run(self) -> None:
        within = {part for block in self.blocks for part in block.modules()}
        # A layer with adapters is one product.
        adapted = [part for part in self.base.modules() if hasattr(part, "lora_A")]
        hidden = {inner for part in adapted for inner in part.modules()} - set(adapted)
        with ExitStack() as hooks, self.mixers.apart(self), _told_apart(self.blocks):
            for part in (x for x in self.base.modules() if x not in hidden):
                if part in within:
                    hook = self._layer if part in set(self.blocks) else self._inner
                    if not isinstance(part, nn.ModuleList):
                        hooks.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
                elif part in adapted or not any(True for _ in part.children()):
                    hooks.callback(part.register_forward_hook(self._outer, with_kwargs=True).remove)
            generator = torch.Generator().manual_seed(0)
            vocabulary = self.base.get_input_embeddings().weight.shape[0]
            token_T = torch.randint(vocabulary, self.position_T.shape, generator=generator)
            try:
                result = self.base(
                    input_ids=token_T[None].to(self.device), position_ids=self.position_T[None],
                    attention_mask=no_mask(self.device), use_cache=False, layout=self,
                )  # fmt: skip
            except UnsupportedAttention as error:
                raise Unlike(f"its attention needs what pages lack ({error})") from error
        self.result = result["last_hidden_state"]
        if len(self.layers) != len(self.blocks):
            raise Unlike("some of its layers were not called")

    def _outer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        pair = isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, Tensor) for x in output)
        if pair or (isinstance(output, Tensor) and output.is_complex()):
            self.rotations.add(module, args, kwargs)
        elif (call := call_of(module, args, kwargs, output)) is not None:
            self.outside.append(call)

    def _inner(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (call := call_of(module, args, kwargs, output)) is not None:
            self.inside.append(call)

    def _layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = call_of(module, args, kwargs, output)
        assert call is not None
        if not self.layers:
            self.first = call.input
        elif not same(call.input, self.last):
            raise Unlike("something comes between its layers")
        self.last = call.output
        self.layers.append(self.read(self, call))
        self.inside.clear()

    def parts(self, whole: Call) -> list[Call | Attended]:
        """Calls of modules inside, and of no others."""
        modules = set(whole.module.modules()) - {whole.module}
        return [x for x in self.inside if isinstance(x, Attended) or x.module in modules]


def singles(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own tensors of one number."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [(name, x) for name, x in own if x.numel() == 1 and x.is_floating_point()]


@contextmanager
def _told_apart(blocks: nn.ModuleList) -> Iterator[None]:
    """Meanwhile such numbers are a half, a third...: while they are 1, as they may be at first, they do nothing."""
    found = [(place, x.data) for block in blocks for place, (_, x) in enumerate(singles(block))]
    kept = [x.clone() for _, x in found]
    try:
        for place, x in found:
            x.fill_(1 / (place + 2))
        yield
    finally:
        for (_, x), before in zip(found, kept, strict=True):
            x.copy_(before)


def query_scale(config: Any, positions: int, device: torch.device) -> Tensor | None:
    """What queries at each position are multiplied by, float32 [P]: ``1 + beta log(1 + floor(position / original))``.

    None where the config has no beta, or ends before the first position that it counts at. (Llama 4 and Ministral 3.)
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    beta, original = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if not beta or not original or positions <= original:
        return None
    scale_P: Tensor = 1 + beta * torch.log1p(torch.arange(positions, device=device) // original)
    return scale_P
