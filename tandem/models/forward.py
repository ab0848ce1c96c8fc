"""A packed batch through a model: token log-probs and entropies, or values and scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tandem.batch import Asks, Batch, Outputs, filled, send
from tandem.errors import UserError
from tandem.functional.balance import balance_loss
from tandem.functional.distillation import Against
from tandem.functional.divergence import Divergence, with_tail
from tandem.functional.logprobs import CHUNK_BYTES, Added, chunked_head
from tandem.kernels import products
from tandem.kernels.logprob import PLAIN, HeadShape
from tandem.models.attention import PackedLayout, no_mask, packed_layout
from tandem.models.compiled import Blocks
from tandem.models.folder import quiet_transformers
from tandem.models.lora.adapters import Adapters
from tandem.models.lora.pairs import NAME
from tandem.models.moe.routers import (
    ROUTER_LOGITS,
    Picks,
    experts_of_a_token,
    in_float32,
    no_experts,
    quieted,
    routers_of,
)
from tandem.models.quantized.layers import numbers_in, quantized_in
from tandem.models.recurrent.segments import Segments
from tandem.models.recurrent.states import Mixers, Told
from tandem.models.seeing import PartNames, SeeingModel
from tandem.models.sharing import sharing_of
from tandem.parallel.sharding import shard, transformer_layers
from tandem.parallel.world import World
from tandem.whole import writing

log = logging.getLogger("tandem")
FEW_TOKENS = 1024
"""On a CPU 1,024 tokens and more are filled up to a number that is likely to come again."""


@dataclass
class LoadedModel:
    """An unmodified transformers module, its tokenizer, and how batches go through it."""

    module: Any
    tokenizer: Any
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What it computes in. Loaded parameters are float32 until a trainer or scorer takes them over (``compute_in``)."""
    packed: bool = False
    """Whether it runs packed sequences through Tandem's attention; else they are padded, with its own attention."""
    equal_lengths: bool = False
    """Whether those that are padded may only be of one length: padding would change what it computes."""
    turning: int | None = None
    """``tandem.models.proof.limits.turning_point``: longer sequences go through apart from the others."""
    split_head: bool = False
    """Whether its logits are its output embedding applied to its last hidden state, so that the head can be chunked."""
    head_shape: HeadShape = PLAIN
    """What is done to their product, where the head is split."""
    sharded: Sharded | None = None
    """The call to make where parameters are sharded, and the device to make it on."""
    blocks: Blocks | None = None
    """Its transformer layers, compiled for the calls made here; others, such as an engine's, run them as they are."""
    mixers: Mixers | None = None
    """Its parts that carry a state from token to token, if it has any: packed segments go through them one by one."""
    router_logits: bool = False
    """Whether its config, as it is exported, makes every forward give its routers' logits."""
    head_gradient: Callable[[], Tensor] | None = None
    """Where the gradient of the language-model head's weight is to be added to, if not to the weight's own."""
    picks: Picks | None = None
    """What its routers pick, where somebody counts it (``Asks.load``)."""
    adapters: Adapters | None = None
    """The adapters on it, which are trained instead of it."""
    seeing: SeeingModel | None = None
    """The model that also sees whose text half it is, and among whose other parts it is saved."""
    shares_base: bool = False
    """Whether what they are on is another model's, too."""
    teacher_head: tuple[Tensor, Tensor | None] | None = None
    """Weight [V, D] and bias of the head of the teacher that it learns from, whose hidden states a batch brings."""

    @cached_property
    def words(self) -> int:
        """Token ids that the tokenizer has are below it. Rows of the vocabulary beyond are padding."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @property
    def experts_of_a_token(self) -> int | None:
        """How many experts a router picks, where it has a load-balancing loss; else None."""
        return experts_of_a_token(type(self.module), self.module.config)

    @property
    def device(self) -> torch.device:
        """Where it computes. Offloaded parameters may lie elsewhere."""
        return self.sharded.device if self.sharded else next(self.module.parameters()).device

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def scalar(self) -> bool:
        """Whether it has a scalar head (reward model, critic) instead of a language-model head."""
        return hasattr(self.module, "score")

    def require_balance(self) -> None:
        """Raises UserError where forwards cannot give ``balance_S``."""
        if self.experts_of_a_token is None:
            raise no_experts(type(self.module))
        if not (self.scalar or self.split_head):
            raise UserError(
                f"aux_loss_coef: {type(self.module).__name__} gives its routers' logits beside its own loss only; "
                "leave it out"
            )

    def count_picks(self) -> None:
        """From now on forwards can give ``load_LE``. Raises UserError where its routers have no biases."""
        if self.adapters is not None:
            raise UserError("bias_update_speed: adapters leave the biases of the base's routers alone; leave it out")
        self.picks = self.picks or Picks(self.module)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Casts the floating parameters in place. Buffers stay: rotary frequencies do not survive bfloat16."""
        for parameter in self.module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        self.route_in_float32(dtype)

    def route_in_float32(self, dtype: torch.dtype) -> None:
        """Where the model computes in ``dtype``, in less, its routers do not."""
        for router in routers_of(self.module) if dtype != torch.float32 else []:
            in_float32(router)

    def compile_blocks(self, mode: Literal["auto", "on", "off"]) -> None:
        """Compiles the transformer layers from their next call here on. ``auto``: on a GPU.

        Only if ``packed``, and without ``mixers``.
        """
        if self.packed and self.mixers is None and (mode == "on" or (mode == "auto" and self.device.type == "cuda")):
            self.blocks = Blocks(transformer_layers(self.module), name=type(self.module).__name__)
        elif mode == "on":
            why = "they keep states" if self.packed else "its sequences are padded"
            log.warning("%s: compile on: its layers are not compiled: %s", type(self.module).__name__, why)

    def shard(self, world: World, *, keep_gathered: bool = False, offload: bool = False) -> None:
        """Splits the parameters over the world's ranks (``tandem.parallel.sharding.shard``), in float32.

        Weights in few bits stay whole on every rank: nothing of them has to be gathered. Raises UserError where these
        are to ``offload``.
        """
        coded = [layer.weight for layer in quantized_in(self.module).values()]
        if coded and offload:
            raise UserError(
                f"offload: {type(self.module).__name__} has layers in few bits, which stay on their device; leave it "
                "at none or optimizer"
            )
        self.sharded = Sharded(self, world.device)
        self.route_in_float32(self.torch_dtype)
        if self.adapters is not None:
            # Slices of what no step changes need no more bits than what is computed with.
            for parameter in self.module.parameters():
                if not parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.torch_dtype)
        shard(
            self.sharded,
            transformer_layers(self.module),
            world,
            compute_dtype=self.torch_dtype,
            keep_gathered=keep_gathered,
            offload=offload,
            kept=coded,
        )

    def export(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes a Hugging Face folder: weights (``state``, or as they are) as safetensors, config, tokenizer.

        Of a model with adapters, a folder that peft reads: these, the base's config, the tokenizer. Of the text half of
        a model that also sees (``seeing``), that one's folder.

        Raises DiskFailure where the disk is full or refuses.
        """
        if self.router_logits:
            setattr(self.module.config, ROUTER_LOGITS, True)
        try:
            with quiet_transformers(), writing(folder):
                if self.adapters is not None:
                    names = None if self.seeing is None else PartNames.of(self.seeing.config)
                    parameters = dict(self.module.named_parameters()) if state is None else state
                    self.adapters.write(folder, parameters, names)
                elif self.seeing is not None:
                    self.seeing.write(folder, self.module, self.module.state_dict() if state is None else state)
                else:
                    self.module.save_pretrained(folder, **({} if state is None else {"state_dict": dict(state)}))
                self.tokenizer.save_pretrained(folder)
        finally:
            quieted(self.module.config)


class Sharded(nn.Module):
    """A model's whole forward, head included, as the one call that gathers and frees its parameters (FSDP's root)."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        super().__init__()
        self.module = model.module
        self.model = model
        self.device = device

    def forward(self, batch: Batch, **options: Any) -> tuple[Tensor | None, ...]:
        # A plain tuple: hooks look for tensors in it to hang the backward on.
        return tuple(vars(_compute(self.model, batch, **options)).values())


def forward(model: LoadedModel, batch: Batch, ask: Asks | None = None, **options: Any) -> Outputs:
    """Runs ``batch`` (on the model's device) with gradient where enabled. ``options`` are fields of ``Asks``.

    A causal LM gives ``logp_T`` at the temperature (and ``entropy_T``, ``divergence_T`` if asked), a scalar model
    ``scalar_T``. Only trainable tokens go through the language-model head.
    """
    ask = Asks(**options) if ask is None else ask
    if model.sharded is None:
        return _compute(model, batch, ask=ask)
    found = model.sharded(batch, ask=ask)
    return Outputs(**dict(zip((f.name for f in fields(Outputs)), found, strict=True)))


def _compute(model: LoadedModel, batch: Batch, *, ask: Asks) -> Outputs:
    if model.scalar or model.split_head:
        source_T, routed = _run(model, model.module.base_model, batch, "last_hidden_state", ask)
    else:
        source_T, routed = _run(model, model.module, batch, "logits", ask)
    if model.scalar:
        scalar_T = model.module.score(source_T.to(model.module.score.weight.dtype)).squeeze(-1).float()
        return Outputs(scalar_T=scalar_T, **routed)
    index_N = batch.index_N
    head: Any
    if model.split_head:
        head, shape = model.module.get_output_embeddings(), model.head_shape
    else:
        head, shape = torch.nn.Identity(), PLAIN
    # Not by brackets, whose gradient sorts the places first: here none comes twice.
    source_N = source_T.index_select(0, index_N - 1)
    if model.split_head:
        # Some add up their layers in float32 (Mamba).
        source_N = source_N.to(head.weight.dtype)
    if ask.states:
        # So that logits are the head's product with them, whoever makes it. (A head that bends logits gives no states.)
        return Outputs(state_TD=_spread(source_N * shape.scale, index_N, batch.tokens))
    if ask.top_k:
        logp_NK, id_NK = _likeliest(head, source_N, ask, model.words, shape)
        return Outputs(
            top_logp_TK=_spread(logp_NK, index_N, batch.tokens), top_id_TK=_spread(id_NK, index_N, batch.tokens)
        )
    added = None
    if hasattr(head, "lora_A"):
        head, added = _apart(head, source_N)
    logp_N, entropy_N, divergence_N = chunked_head(
        head,
        source_N,
        batch.token_ids_T[index_N],
        temperature=ask.temperature,
        entropy=ask.entropy or ask.entropy_gradient,
        entropy_grad=ask.entropy_gradient,
        weight_gradient=model.head_gradient,
        against=_against(ask.divergence, model, batch, index_N) if ask.divergence is not None else None,
        shape=shape,
        added=added,
    )
    return Outputs(
        logp_T=_spread(logp_N, index_N, batch.tokens),
        entropy_T=_spread(entropy_N, index_N, batch.tokens) if entropy_N is not None else None,
        divergence_T=_spread(divergence_N, index_N, batch.tokens) if divergence_N is not None else None,
        **routed,
    )


def _apart(head: Any, source_N: Tensor) -> tuple[Any, Added | None]:
    """A head with adapters as the head without, and what they add to its logits, if they are not off."""
    if head.disable_adapters:
        return head.base_layer, None
    inner_NR = products.linear(source_N, head.lora_A[NAME].weight) * head.scaling[NAME]
    return head.base_layer, Added(inner_NR, head.lora_B[NAME].weight)


def _likeliest(head: Any, source_N: Tensor, ask: Asks, words: int, shape: HeadShape) -> tuple[Tensor, Tensor]:
    """The likeliest tokens' log-probs with their tail, [N, K + 1], and their ids, [N, K], some rows at a time."""
    logps, ids = [], []
    vocabulary = len(head.weight) if hasattr(head, "weight") else source_N.shape[-1]
    rows = max(1, CHUNK_BYTES.get(source_N.device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary))
    for source_n in source_N.split(rows):
        logits_nV = shape.of(head(source_n)[:, :words]).float() / ask.temperature
        # One token at least makes the tail.
        id_nK = logits_nV.topk(min(ask.top_k, logits_nV.shape[-1] - 1), dim=-1).indices
        logps.append(with_tail(logits_nV, id_nK))
        ids.append(id_nK)
    return torch.cat(logps), torch.cat(ids)


def _against(ask: Divergence, model: LoadedModel, batch: Batch, index_N: Tensor) -> Against:
    """What the teacher has said of these tokens. Raises ValueError where it has said nothing that is asked for."""
    seen = batch.by(ask.teacher)
    if seen.top_id_TK is not None and seen.top_logp_TK is not None:
        return Against(
            ask=ask, words=model.words, top_logp_NK=seen.top_logp_TK[index_N], top_id_NK=seen.top_id_TK[index_N]
        )
    if model.teacher_head is None:
        raise ValueError(f"the head of the {ask.teacher} is not there; what should bring it is not wired")
    state_ND = filled(seen.state_TD, f"seen[{ask.teacher!r}].state_TD")[index_N]
    return Against(ask=ask, words=model.words, state_ND=state_ND, head=model.teacher_head)


def _spread(value_N: Tensor, index_N: Tensor, tokens: int) -> Tensor:
    """[N] or [N, D] values at their tokens' places, 0 elsewhere."""
    return value_N.new_zeros(tokens, *value_N.shape[1:]).index_put((index_N,), value_N)


def hidden_states(model: LoadedModel, batch: Batch) -> Tensor:
    """Last hidden state [T, D]."""
    return _run(model, model.module.base_model, batch, "last_hidden_state", Asks())[0]


def native_logits(model: LoadedModel, batch: Batch) -> Tensor:
    """The module's own logits [T, V]."""
    return _run(model, model.module, batch, "logits", Asks())[0]


def _run(model: LoadedModel, module: Any, batch: Batch, output: str, ask: Asks) -> tuple[Tensor, dict[str, Tensor]]:
    """One field of the module's output, with its tokens laid out as in the batch, and what its routers say: those of
    ``balance_S`` and ``load_LE`` that are asked for.

    Raises UserError for a sharded model whose segments cannot all go through together.
    """
    kinds = _kinds(model, batch)
    if len(set(kinds)) == 1:
        return _together(model, module, batch, output, ask)
    if model.sharded is not None:
        raise UserError(
            f"{type(model.module).__name__}: its parameters are sharded, and sequences of "
            f"{min(batch.lengths)} and {max(batch.lengths)} tokens do not go through it together; "
            "train it in one process, or on sequences that are all shorter or all longer"
        )
    apart = replace(batch.unshared(), segments_per_unit=1)
    parts = [[s for s, one in enumerate(kinds) if one == kind] for kind in dict.fromkeys(kinds)]
    found = [_together(model, module, apart.select(segments), output, ask) for segments in parts]
    index_T = torch.cat([apart.tokens_of(segments) for segments in parts]).argsort()
    index_S = torch.tensor([s for segments in parts for s in segments]).argsort()
    results, said = zip(*found, strict=True)
    device = batch.token_ids_T.device
    routed = {}
    if ask.balance:
        routed["balance_S"] = torch.cat([one["balance_S"] for one in said]).index_select(0, send(index_S, device))
    if ask.load:
        routed["load_LE"] = torch.stack([one["load_LE"] for one in said]).sum(dim=0)
    return torch.cat(results).index_select(0, send(index_T, device)), routed


def _kinds(model: LoadedModel, batch: Batch) -> list[int]:
    """For each segment a number, the same for those that may go through the model together."""
    if not model.packed and model.equal_lengths:
        return batch.lengths
    if model.turning is not None:
        return [int(length > model.turning) for length in batch.lengths]
    return [0] * batch.segments


def _together(
    model: LoadedModel, module: Any, batch: Batch, output: str, ask: Asks
) -> tuple[Tensor, dict[str, Tensor]]:
    asked = {ROUTER_LOGITS: True} if ask.balance else {}
    watched: AbstractContextManager[dict[int, Tensor]] = nullcontext({})
    if ask.load:
        assert model.picks is not None
        watched = model.picks.watched()
    if model.packed:
        compiled = model.blocks is not None and model.blocks.working
        device, sharing = batch.token_ids_T.device, sharing_of(batch)
        token_ids, position = batch.token_ids_T, batch.position_T
        if sharing is not None:
            token_ids, position = token_ids[sharing.kept_U], position[sharing.kept_U]
        tokens = len(token_ids)
        spare = _spare(tokens) if device.type == "cpu" else 0
        if spare:
            token_ids, position = F.pad(token_ids, (0, spare)), F.pad(position, (0, spare))
        layout = packed_layout(batch.bounds, device, model.torch_dtype, compiled=compiled, sharing=sharing, spare=spare)
        apart: AbstractContextManager[None] = nullcontext()
        if model.mixers is not None:
            beside = layout if isinstance(layout, PackedLayout) else None
            if beside is None and not model.mixers.packed:
                beside = PackedLayout(batch.bounds, device, sharing)
            apart = model.mixers.apart(beside, Told(Segments(batch.bounds, device), sharing))
        with apart, watched as picked:
            out = module(
                input_ids=token_ids[None],
                position_ids=position[None],
                attention_mask=no_mask(device),
                use_cache=False,
                layout=layout,
                **asked,
            )
        laid_out = (lambda rows: rows[:tokens]) if sharing is None else sharing.expand
        return laid_out(out[output][0]), _routed(model, batch, out, picked, laid_out, ask)
    segments = batch.token_ids_T.split(batch.lengths)
    real_SL = pad_sequence([torch.ones_like(s) for s in segments], batch_first=True)
    with watched as picked:
        out = module(
            input_ids=pad_sequence(list(segments), batch_first=True), attention_mask=real_SL, use_cache=False, **asked
        )
    real = real_SL.bool()
    laid_out = lambda rows: rows[real.flatten()]  # noqa: E731
    return out[output][real], _routed(model, batch, out, picked, laid_out, ask)


def _routed(
    model: LoadedModel,
    batch: Batch,
    out: Any,
    picked: dict[int, Tensor],
    laid_out: Callable[[Tensor], Tensor],
    ask: Asks,
) -> dict[str, Tensor]:
    """``balance_S`` from each router's logits, and ``load_LE`` from what it ``picked``, as far as they are asked for.

    ``laid_out`` puts rows in the order of the batch's tokens.
    """
    found = {}
    if ask.balance:
        assert model.experts_of_a_token is not None
        rows = [laid_out(x.reshape(-1, x.shape[-1])) for x in out.router_logits]
        bounds = send(batch.bounds, batch.token_ids_T.device)
        found["balance_S"] = balance_loss(rows, bounds, model.experts_of_a_token)
    if ask.load:
        assert model.picks is not None
        rows = [laid_out(picked[number].flatten(0, -2)) for number in sorted(picked)]
        found["load_LE"] = model.picks.load(rows)
    return found


def _spare(tokens: int) -> int:
    """Tokens, at most one in 32, that make the sizes of large batches repeat from step to step.

    New sizes cost a CPU dearly: memory that was freed does not fit them, and oneDNN compiles for each.
    """
    return -tokens % (1 << (tokens.bit_length() - 6)) if tokens >= FEW_TOKENS else 0


def describe_model(model: LoadedModel) -> str:
    """Its class, size, device and how its batches are laid out."""
    parameters = numbers_in(model.module)
    layout = "packed" if model.packed else "padded, those of one length together" if model.equal_lengths else "padded"
    if model.blocks is not None:
        layout += ", layers compiled in the first step" if model.blocks.working else ", layers not compiled"
    size = f"{parameters / 1e6:.2f}M parameters"
    if model.adapters is not None:
        trained = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
        of = " of the policy's own" if model.shares_base else ""
        size = f"{trained / 1e6:.2f}M parameters in adapters on {(parameters - trained) / 1e6:.2f}M{of}"
    if layers := quantized_in(model.module):
        few = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
        size += f", {few / 1e6:.2f}M of them in {next(iter(layers.values())).kind}"
    if model.seeing is not None:
        layout += f"; the text half of a {model.seeing.config.model_type}: its vision parts stay as they are, unloaded"
    return f"{type(model.module).__name__}, {size}, {model.device}, {model.dtype}, {layout}"
