"""Which experts tokens take in a forward, to which other forwards of the same tokens can be held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tandem.models.moe.experts import called_experts


class Routes:
    """The experts that each token takes in a forward, and their weights.

    Which of two experts that are almost equal comes first is an accident of rounding, and all that follows of it is
    another. Forwards that are held to the same experts differ by rounding alone. Tokens are known by their ids.
    """

    def __init__(self, module: Any) -> None:
        self.embedding = module.get_input_embeddings()
        self.experts: list[Any] = called_experts(module)
        self.place_V = torch.empty(0)
        """int64: of each id the place of its token among N; N of the others."""
        self.taken: list[tuple[Tensor, Tensor]] = []
        """Of each part of ``experts``: the experts of each token and their weights [N + 1, K], the last of no token."""
        self.weights: list[Tensor] = []
        """The same weights as [N + 1, E + 1] of E experts."""

    @contextmanager
    def written(self) -> Iterator[None]:
        """A forward inside is what others can be held to, if no two of its tokens are alike and all take experts."""
        ids: list[Tensor] = []
        calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.experts]
        with self._watched(ids.append, lambda number, *given: calls[number].append(given[1:])):
            yield
        id_N = torch.cat(ids)
        whole = all(sum(len(index_TK) for index_TK, _ in of_part) == len(id_N) for of_part in calls)
        if not whole or len(id_N.unique()) < len(id_N):
            return
        self.place_V = torch.full((len(self.embedding.weight),), len(id_N), device=id_N.device)
        self.place_V[id_N] = torch.arange(len(id_N), device=id_N.device)
        for number, (index, weight) in enumerate(zip(*of_part, strict=True) for of_part in calls):
            # A row more, for tokens that are not among these.
            self.taken.append((torch.cat([*index, index[0][:1]]), torch.cat([*weight, weight[0][:1]])))
            self.weights.append(self._by_expert(number, *self.taken[-1]))

    @contextmanager
    def held(self) -> Iterator[list[Tensor]]:
        """In forwards inside, which may be captured, each token takes the experts that it took.

        Gives the ``weights`` that the routers in there had for the tokens; NaN where they were not asked.
        """
        found = [torch.full_like(weight_NE, float("nan")) for weight_NE in self.weights]
        place_T = torch.empty(0)

        def find(id_T: Tensor) -> None:
            nonlocal place_T
            place_T = self.place_V[id_T]

        def hold(number: int, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, ...]:
            found[number].index_copy_(0, place_T, self._by_expert(number, index_TK, weight_TK))
            index_NK, weight_NK = self.taken[number]
            known_T1 = (place_T < len(index_NK) - 1)[:, None]
            index_TK = torch.where(known_T1, index_NK[place_T], index_TK)
            return hidden_TD, index_TK, torch.where(known_T1, weight_NK[place_T], weight_TK)

        with self._watched(find, hold):
            yield found

    def _by_expert(self, number: int, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """float32 [T, E + 1]: some pick experts that do not exist, to pick none."""
        count = self.experts[number].num_experts
        weight_TE = torch.zeros(len(index_TK), count + 1, device=index_TK.device)
        return weight_TE.scatter_add_(1, index_TK.clamp(max=count), weight_TK.float())

    @contextmanager
    def _watched(self, see: Callable[[Tensor], None], call: Callable[..., Any]) -> Iterator[None]:
        """With ``see`` called for ids [T] that are embedded, ``call`` for what each part of experts is given."""
        with ExitStack() as hooks:
            hooks.callback(self.embedding.register_forward_pre_hook(lambda _, x: see(x[0].flatten())).remove)
            for number, part in enumerate(self.experts):
                hook = partial(lambda number, _, given: call(number, *given), number)
                hooks.callback(part.register_forward_pre_hook(hook).remove)
            yield
