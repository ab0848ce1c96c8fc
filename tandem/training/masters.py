"""Parameters in bfloat16, trained as float32: no step is lost to rounding, and sampling reads them in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Masters:
    """A float32 copy of each low-precision parameter. Gradients gather in the copies, and the optimizer steps them.

    A frozen parameter is cast like the others, since products need one type, and has no copy: nothing changes it. A
    gradient is added to its copy's as soon as backward has it (in float32, so that micro-batches add up), and freed.
    Parameters that are float32 already stand for themselves.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.named: dict[str, nn.Parameter] = {}
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point() or dtype == torch.float32:
                self.named[name] = parameter
                continue
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
                self.named[name] = parameter
                continue
            master = nn.Parameter(parameter.detach().float().clone())
            parameter.data = parameter.data.to(dtype)
            parameter.register_post_accumulate_grad_hook(_adds_to(master))
            self.pairs.append((parameter, master))
            self.named[name] = master

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the copies into the parameters, rounded."""
        if self.pairs:
            torch._foreach_copy_([p for p, _ in self.pairs], [master for _, master in self.pairs])

    def gradient_of(self, parameter: Tensor) -> Callable[[], Tensor] | None:
        """Gives the float32 gradient of the parameter's copy, to be added to: zeros where there is none yet.

        None for a parameter that stands for itself.
        """
        master = next((master for low, master in self.pairs if low is parameter), None)
        if master is None:
            return None

        def gradient() -> Tensor:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            return master.grad

        return gradient


def _adds_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if master.grad is None:
            # The first micro-batch's makes room. Room kept from step to step would be missing while sampling.
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
