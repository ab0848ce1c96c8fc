"""Scans of ours, the Mambas' and the delta rule's: against one token after another, and for those of transformers."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from helpers.engine_models import tokenizer
from helpers.family_models import made
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn
from transformers.models.qwen3_5 import modeling_qwen3_5

from tandem.kernels import states as kernels
from tandem.kernels.chunks import Chunks
from tandem.models.loading import prepare_module
from tandem.models.recurrent import scans
from tandem.models.recurrent.segments import Segments
from tandem.models.recurrent.states import put_right


@pytest.fixture(autouse=True)
def _classes_made_anew() -> Any:
    scans._scanning.cache_clear()
    yield
    scans._scanning.cache_clear()


def one_by_one(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out_of: Tensor, skip: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """arXiv:2405.21060, eq. 2, token by token."""
    heads = x.shape[2] // into.shape[2]
    into, out_of = (y.repeat_interleave(heads, 2) for y in (into, out_of))
    state = x.new_zeros(*x[:, 0].shape, into.shape[-1]) if state is None else state
    given = []
    for t in range(x.shape[1]):
        state = (step[:, t] * rate).exp()[..., None, None] * state
        state = state + torch.einsum("bhp,bhn->bhpn", step[:, t, :, None] * x[:, t], into[:, t])
        given.append(torch.einsum("bhpn,bhn->bhp", state, out_of[:, t]) + skip[:, None] * x[:, t])
    return torch.stack(given, 1), state


def drawn(tokens: int, groups: int, *, heads: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, steps, rates, what goes into the state, what is read of it, skips, and a state."""
    torch.manual_seed(0)
    shapes = [(2, tokens, groups, 5)] * 2
    rate = -3 * torch.rand(heads).double()
    tensors = [torch.randn(2, tokens, heads, 3), torch.rand(2, tokens, heads), rate, *map(torch.randn, shapes)]
    tensors += [torch.randn(heads), torch.randn(2, heads, 3, 5)]
    return [x.to(dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize(
    ("tokens", "chunk", "groups", "begun"),
    [(1, 4, 2, True), (7, 3, 2, True), (12, 4, 1, False), (5, 256, 4, True), (300, 256, 2, False)],
)
def test_a_scan_is_one_token_after_another(tokens: int, chunk: int, groups: int, begun: bool) -> None:
    """Also its gradients. Chunks that are full, that are not, one alone, and more of them than were asked for."""
    *given, state = drawn(tokens, groups)
    given += [state] if begun else []
    found = kernels.scan(*given[:6], state if begun else None, chunks=Chunks.of_rows(given[0], chunk))
    truth = one_by_one(*given[:6], state if begun else None)
    assert_alike(found, truth, given)


def assert_alike(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], given: list[Tensor]) -> None:
    weights = [torch.randn_like(x) for x in truth]
    for one, two in zip(found, truth, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights, strict=True)), given)
        for out in (found, truth)
    ]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 2, 7, 50])
def test_a_scan_of_channels_is_one_token_after_another(tokens: int) -> None:
    """arXiv:2312.00752, eq. 2, also its gradients."""
    torch.manual_seed(0)
    shapes = (2, tokens, 3), (2, tokens, 3), (3, 4), (2, tokens, 4), (2, tokens, 4), (2, 3, 4)
    given = [torch.randn(shape).double() for shape in shapes]
    given = [x.requires_grad_() for x in (given[0], given[1].abs(), -given[2].exp(), *given[3:])]
    x, step, rate, into, out_of, state = given
    read = []
    for t in range(tokens):
        state = (step[:, t, :, None] * rate).exp() * state + (step * x)[:, t, :, None] * into[:, t, None]
        read.append((state * out_of[:, t, None]).sum(-1))
    assert_alike(kernels.scan_channels(*given), (torch.stack(read, 1), state), given)


def test_a_small_step_among_large_ones_is_not_lost_in_float32() -> None:
    """What is kept over one token is exp(-0.001), however much those before it have decayed."""
    *given, _ = drawn(64, 1, dtype=torch.float32)
    with torch.no_grad():
        given[1][:] = torch.where(torch.arange(64)[None, :, None] % 8 < 6, 400.0, 1e-3)
        found, _ = kernels.scan(*given, chunks=Chunks.of_rows(given[0], 64))
        exact, _ = one_by_one(*(x.double() for x in given), None)
    assert ((found - exact).abs() <= 2e-5 * exact.abs() + 1e-3).all()


def rule_by_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """arXiv:2412.06464, eq. 10, token by token."""
    query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    state = value.new_zeros(len(key), *key.shape[2:], value.shape[-1]) if state is None else state
    given = []
    for t in range(key.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        change = beta[:, t, :, None] * (value[:, t] - torch.einsum("bhk,bhkv->bhv", key[:, t], state))
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], change)
        given.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state) / key.shape[-1] ** 0.5)
    return torch.stack(given, 1), state


def drawn_rule(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values, decays, betas up to 2, and a state."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, tokens, 3, size) for size in (4, 4, 5)]
    tensors += [-2 * torch.rand(2, tokens, 3), 2 * torch.rand(2, tokens, 3), torch.randn(2, 3, 4, 5)]
    return [x.to(dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize(("tokens", "chunk", "begun"), [(1, 4, True), (7, 3, True), (12, 4, False), (70, 64, True)])
def test_a_scan_of_the_delta_rule_is_one_token_after_another(tokens: int, chunk: int, begun: bool) -> None:
    """Also its gradients, of what is given and of the last states."""
    given = drawn_rule(tokens)[: 6 if begun else 5]
    found = kernels.scan_delta(*given, chunks=Chunks.of_rows(given[0], chunk))
    truth = rule_by_token(*given[:5], given[5] if begun else None)
    assert_alike(found, truth, given)


def test_a_scan_of_the_delta_rule_keeps_its_digits_in_float32() -> None:
    """Where keys are alike and overwrite all, and where small decays come after large ones."""
    given = [x.detach() for x in drawn_rule(64, torch.float32)[:5]]
    given[1] = given[1][:, :1] + 1e-3 * given[1]
    given[3] = torch.where(torch.arange(64)[None, :, None] % 8 < 2, -400.0, -1e-3).expand_as(given[3])
    given[4] = torch.full_like(given[4], 1.9)
    found, state = kernels.scan_delta(*given, chunks=Chunks.of_rows(given[0], 64))
    exact, last = rule_by_token(*(x.double() for x in given), None)
    assert (found - exact).norm() < 1e-5 * exact.norm()
    assert (state - last).norm() < 1e-5 * last.norm()


def test_the_delta_rule_in_bfloat16_is_no_further_from_the_truth_than_transformers() -> None:
    ours, theirs = scans_of(modeling_qwen3_5.Qwen3_5GatedDeltaNet)
    *given, state = (x.detach() for x in drawn_rule(150, torch.bfloat16))
    given[3], state = given[3].float(), state.float()
    options = {"g": given[3], "beta": given[4], "initial_state": state, "output_final_state": True}
    found, others = (scan(*given[:3], **options, use_qk_l2norm_in_kernel=True) for scan in (ours, theirs))
    truth = rule_by_token(*(x.double() for x in (*given, state)))
    for one, other, exact in zip(found, others, truth, strict=True):
        assert one.dtype == other.dtype
        assert (one - exact).norm() <= 1.01 * (other - exact).norm()


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-next", "olmo-hybrid"])
def test_a_module_is_given_the_scan_of_the_delta_rule(name: str) -> None:
    """As near to the truth as its own, with gradients, of more tokens than a chunk; less is kept for the backward."""
    module = made(name)
    if name == "qwen3-next":
        module.set_experts_implementation("eager")
    ids = torch.arange(2, 82)[None] % 60 + 2

    def run(module: Any) -> tuple[int, Tensor, Tensor]:
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logits = module(input_ids=ids, use_cache=False).logits
        found = torch.autograd.grad(logits.logsumexp(-1).sum(), [x for x in module.parameters() if x.requires_grad])
        return sum(kept.values()), logits.detach(), torch.cat([x.flatten() for x in found])

    before, *theirs = run(module)
    put_right(module)
    assert {type(x).__module__ for x in module.modules() if "Delta" in type(x).__name__} == {scans.__name__}
    after, *ours = run(module)
    assert after < 0.8 * before
    for one, other, exact in zip(ours, theirs, run(copy.deepcopy(module).double())[1:], strict=True):
        assert (one - exact).norm() <= 2 * (other - exact).norm()


def arguments(tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Of ``mamba2_chunk_scan``."""
    x, step, rate, into, out_of, skip, state = (y.detach().to(dtype) for y in drawn(tokens, 2))
    options = {"chunk_size": 8, "D": skip, "dt_bias": skip.flip(0), "dt_softplus": True, "initial_states": state}
    return [x, step, rate.float(), into, out_of], options | {"return_final_states": True}


def scans_of(kind: Any) -> tuple[Any, Any]:
    """Ours and transformers'."""
    (name,) = scans.SCANS.keys() & kind.forward.__wrapped__.__code__.co_names
    ours = scans._scanning(kind).forward.__globals__[name]
    return ours, inspect.unwrap(ours.args[0])


def test_in_bfloat16_it_is_no_further_from_the_truth_than_transformers() -> None:
    ours, theirs = scans_of(modeling_mamba2.Mamba2Mixer)
    given, options = arguments(40, torch.bfloat16)
    wide, wide_options = (
        [x.double() for x in given],
        {**options, **{n: options[n].double() for n in ("D", "dt_bias")}},
    )
    step = torch.nn.functional.softplus(wide[1] + wide_options["dt_bias"])
    truth = one_by_one(wide[0], step, *wide[2:], wide_options["D"], options["initial_states"].double())
    found, others = ours(*given, **options), theirs(*given, **options)
    for one, other, exact in zip(found, others, truth, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - exact).norm() < min(1e-6 * exact.norm(), (other - exact).norm())


class Made(TorchDispatchMode):
    """Numbers in the largest tensor that was made, and in all of them."""

    largest, all = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
                self.all += x.numel()
        return made


def test_no_tensor_has_two_tokens_a_head_and_its_state() -> None:
    """Nor is a chunk longer than the sequence, or what weighs its tokens kept for the backward pass."""
    ours, _ = scans_of(modeling_mamba2.Mamba2Mixer)
    rows, tokens, heads, size, states = 3, 40, 4, 16, 32
    x, step = torch.randn(rows, tokens, heads, size, requires_grad=True), torch.rand(rows, tokens, heads)
    into, head, rate = torch.randn(2, rows, tokens, 1, states), torch.rand(heads), -torch.rand(heads)
    kept: list[Tensor] = []
    with Made() as made_here, torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        out = ours(x, step, rate, *into, 256, D=head, dt_bias=head, dt_softplus=True)
    assert {y.data_ptr() for y in kept} <= {y.data_ptr() for y in (x, step, rate, *into, head)}
    out.sum().backward()
    assert made_here.largest <= heads * rows * max(tokens * tokens, 2 * size * states, tokens * size)


def test_twice_as_many_tokens_of_mamba_make_twice_as_many_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back, where the gradient of each token made a tensor of all of them. No part of them is left out."""
    ours, theirs = scans_of(modeling_mamba.MambaMixer)
    numbers = []
    for tokens in (64, 128):
        given, options = scans._channel_trial()
        given = [x if x.shape[0] != 2 else torch.randn(2, x.shape[1], tokens).requires_grad_() for x in given]
        options |= {"z": torch.randn(2, 3, tokens)}
        with Made() as made_here:
            out, state = ours(*given, **options)
            out.sum().backward()
        numbers.append(made_here.all)
    assert numbers[1] < 2.5 * numbers[0]
    monkeypatch.setattr(scans, "LARGEST", 11 * state.numel())
    for one, two in zip(ours(*given, **options), theirs(*given, **options), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("mamba2", "Mamba2Mixer"), ("jamba", "JambaMambaMixer")])
def test_a_module_is_given_it_by_what_it_calls(name: str, kind: str) -> None:
    """Once, in its copies as well, and not where it calls another."""
    module = made(name)
    ids = torch.arange(2, 32)[None]
    with torch.no_grad():
        exact = module(input_ids=ids).logits
        put_right(module)
        kinds = [type(part) for part in module.modules()]
        assert (module(input_ids=ids).logits - exact).abs().max() < 1e-4
        for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert [type(part) for part in again.modules()] == kinds
            assert torch.equal(again(input_ids=ids).logits, module(input_ids=ids).logits)
            put_right(again)
            assert [type(part) for part in again.modules()] == kinds
        # Somebody's own loop may have compiled it.
        compiled = torch.compile(module.base_model.layers[0], backend="eager", fullgraph=True)
        hidden = module.get_input_embeddings()(ids)
        assert compiled(hidden).sub(module.base_model.layers[0](hidden)).abs().max() < 1e-5
        torch._dynamo.reset()
    changed = {one for one in kinds if one.__module__ == scans.__name__}
    assert [one.__name__ for one in changed] == [kind]
    put_right(other := made("qwen2"))
    assert not any(type(part).__module__ == scans.__name__ for part in other.modules())


def test_it_is_left_out_where_it_is_not_theirs_or_kernels_are_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scan of another meaning, or with other arguments, is the module's own, as that of mamba_ssm is."""

    def other(hidden_states: Tensor, dt: Tensor, *args: Any, **options: Any) -> Any:
        return theirs(hidden_states, 2 * dt, *args, **options)

    def renamed(hidden_states: Tensor, steps: Tensor, rates: Tensor) -> Any:
        raise AssertionError("not to be called")

    def faster(*args: Any, g: Tensor, **options: Any) -> Any:
        return rule(*args, g=2 * g, **options)

    theirs = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)
    rule = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    mixer = modeling_mamba2, "mamba2_chunk_scan", modeling_mamba2.Mamba2Mixer
    delta = modeling_qwen3_5, "torch_chunk_gated_delta_rule", modeling_qwen3_5.Qwen3_5GatedDeltaNet
    for (home, name, kind), scan in ((mixer, other), (mixer, renamed), (delta, faster), (delta, renamed)):
        scans._scanning.cache_clear()
        monkeypatch.setattr(home, name, scan)
        assert scans._scanning(kind) is kind
    assert len(caplog.messages) == 4
    monkeypatch.undo()
    scans._scanning.cache_clear()
    monkeypatch.setattr(
        scans, "_has_kernel", lambda path, name: name in ("mamba_chunk_scan_combined", "chunk_gated_delta_rule")
    )
    for name in ("mamba2", "qwen3.5"):
        put_right(module := made(name))
        assert not any(type(part).__module__ == scans.__name__ for part in module.modules())


@pytest.mark.parametrize("known", [True, False])
def test_parts_in_which_more_goes_from_token_to_token_are_given_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, known: bool
) -> None:
    """As those of somebody's own code may be, which calls what transformers has by its names."""

    def summed(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, seq_idx: Any = None) -> Tensor:
        if not known:
            seq_idx = None if seq_idx is None else seq_idx.long()
        return theirs(x, weight, bias) + 0.1 * x.cumsum(-1)

    theirs = modeling_lfm2.causal_conv1d_fn
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", summed)
    if not known:
        monkeypatch.setattr(scans, "_convolve", lambda theirs, *args, **options: theirs(*args, **options))
    model = prepare_module(made("lfm2"), tokenizer())
    assert model.mixers is not None
    assert (model.packed, model.mixers.packed) == (True, False)
    assert "packed sequences go side by side through its layers with a state" in caplog.text


def test_a_scan_that_is_an_attribute_is_the_modules_own() -> None:
    class Own(modeling_mamba2.Mamba2Mixer):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.mamba2_chunk_scan(causal_conv1d_fn(hidden_states, self.conv1d.weight))

    assert scans._scanning(Own) is Own


@pytest.mark.parametrize("lengths", [(5, 1, 9, 3), (1,), (40, 2, 2, 2, 2, 2, 2, 17)])
@pytest.mark.parametrize("most", [1, 4, 64])
def test_packed_segments_are_scanned_each_by_itself(lengths: tuple[int, ...], most: int) -> None:
    """By chunks of one length, of which the long segments have more. Gradients too, and the convolution before them."""
    segments = Segments(torch.tensor([0, *lengths]).cumsum(0), "cpu")
    tokens = sum(lengths)
    *given, _ = (x[:1].detach().requires_grad_() if x.ndim > 1 else x for x in drawn(tokens, 2))
    rule = [x[:1].detach().requires_grad_() for x in drawn_rule(tokens)[:5]]
    signal, weight = torch.randn(1, 3, tokens, dtype=torch.float64, requires_grad=True), torch.randn(3, 4).double()
    convolve = partial(scans._convolve, modeling_mamba2.causal_conv1d_fn)
    packed = [
        kernels.scan(*given, chunks=segments.chunks(most))[0],
        kernels.scan_delta(*rule, chunks=segments.chunks(most))[0],
        convolve(signal, weight, None, "silu", segments=segments),
        convolve(signal, weight, None, "silu", seq_idx=segments),
    ]
    apart: list[list[Tensor]] = [[], [], [], []]
    for begin, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        cut = [x[:, begin:end] if x.ndim > 1 else x for x in given]
        apart[0].append(kernels.scan(*cut, chunks=Chunks.of_rows(cut[0], 64))[0])
        cut = [x[:, begin:end] for x in rule]
        apart[1].append(kernels.scan_delta(*cut, chunks=Chunks.of_rows(cut[0], 64))[0])
        for out in apart[2:]:
            out.append(convolve(signal[..., begin:end], weight, None, "silu"))
    joined = [torch.cat(out, 1 if number < 2 else 2) for number, out in enumerate(apart)]
    wanted = [x for x in (*given, *rule, signal) if x.requires_grad]
    for one, two in zip(packed, joined, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    factors = [torch.randn_like(x) for x in joined]
    one, two = (
        torch.autograd.grad(sum((x * y).sum() for x, y in zip(outs, factors, strict=True)), wanted)
        for outs in (packed, joined)
    )
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_a_long_segment_does_not_make_the_chunks_of_many_short_ones_long() -> None:
    segments = Segments(torch.tensor([0, 1024, *[10] * 200]).cumsum(0), "cpu")
    chunks = segments.chunks(128)
    assert sum(chunks.counts) * chunks.length <= 1.5 * segments.tokens
    assert segments.chunks(128) is chunks
    assert Segments(torch.tensor([0, 1024, 1000]).cumsum(0), "cpu").chunks(128).length == 64
