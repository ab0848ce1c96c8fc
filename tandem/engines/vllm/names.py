"""Inside a vLLM worker: a pushed tensor under the names of its checkpoint, which are what vLLM's loaders know.

transformers 5 stacks the experts of a layer in one parameter, and calls some modules otherwise than the checkpoints
that it reads. It writes folders in the checkpoints' own way; the same conversion is made here, by views of what came.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.models.lora.pairs import plain_name
from tandem.models.seeing import PartNames
from tandem.models.text_config import sees

_VIEWS = ("Chunk", "SplitModulelist")
"""The conversions that cut a tensor and change nothing in it."""


class Names:
    """How the tensors of a transformers model are called in its checkpoints."""

    def __init__(self, config: Any) -> None:
        """``config``: of the model in transformers. Where its code comes with it, names stay as they are."""
        self.renamings: list[Any] = []
        self.converters: list[Any] = []
        self.parts_of_whole: PartNames | None = None
        """The names of a model that also sees, where its text half is what is pushed."""
        if getattr(config, "auto_map", None):
            return
        from transformers import AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        if sees(config, "the model"):
            self.parts_of_whole = PartNames.of(config)
            module = self.parts_of_whole.whole
        else:
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(config)
        mapping = get_model_conversion_mapping(module, add_legacy=False)
        back = [one.reverse_transform() for one in reversed(mapping) if not isinstance(one, PrefixChange)]
        self.module = module
        self.renamings = [one for one in back if isinstance(one, WeightRenaming)]
        self.converters = [one for one in back if isinstance(one, WeightConverter)]

    def of(self, bucket: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """A bucket's tensors as their checkpoint has them."""
        return [part for name, tensor in bucket for part in self.parts(name, tensor)]

    def layer(self, name: str) -> str:
        """A linear layer's name in its checkpoint. Raises UserError where it has none."""
        ((renamed, _),) = self.parts(f"{name}.weight", torch.empty(0))
        return renamed.removesuffix(".weight")

    def parts(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """The tensor as its checkpoint has it: under another name, or cut into views; below adapters as without them.

        Raises UserError where it would have to be computed.
        """
        from transformers.core_model_loading import rename_source_key

        name = plain_name(name)
        if self.parts_of_whole is not None:
            name = self.parts_of_whole.in_whole(name)
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, reverse=True)
        if pattern is None:
            return [(renamed, tensor)]
        converter = copy.deepcopy(next(one for one in self.converters if pattern in one.source_patterns))
        kinds = [type(operation).__name__ for operation in converter.operations]
        if kinds == ["Transpose"]:
            return [(renamed, tensor.transpose(converter.operations[0].dim0, converter.operations[0].dim1))]
        if tensor.ndim != 3 or any(kind not in _VIEWS for kind in kinds):
            raise UserError(
                f"weight sync: {name} is not cut but computed anew for vLLM ({', '.join(kinds)}), which a push cannot "
                "do; sample with the live engine"
            )
        # A small one, whose numbers say which expert and which half of it each name stands for.
        halves = len(converter.target_patterns) if "Chunk" in kinds else 1
        places = torch.arange(len(tensor) * halves).view(len(tensor), halves, 1)
        converter.add_tensor(renamed, name, pattern, places)
        found = converter.convert(renamed, model=self.module, config=self.module.config)
        cut = tensor.chunk(halves, dim=1)
        parts = []
        for target, place in found.items():
            expert, half = divmod(int(place[0] if isinstance(place, list) else place), halves)
            parts.append((target, cut[half][expert]))
        return parts
