"""Training on a GPU: the kernels' numbers, the memory of log-probs, no wait inside a step, compiled layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers.models import make_tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config

from tandem.batch import TokenLoss
from tandem.data.packing import pack, stamp_weights
from tandem.functional.logprobs import chunked_head
from tandem.kernels import logprob
from tandem.models.attention import Ask, FlashLayout, PackedLayout, packed_layout
from tandem.models.loading import prepare_module
from tandem.models.sharing import sharing_of
from tandem.parallel.shares import shares
from tandem.parallel.world import World
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Sequence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
VOCABULARY = 512


def close(found, exact, share):
    """Within ``share`` of the exact tensor's size, as a whole (norms)."""
    gap = (found.double() - exact.double()).norm() / exact.double().norm()
    assert gap < share, f"off by {gap:.2e} of its norm"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (8, 8, 128)])
def test_flash_with_sinks_equals_scores_in_float32(heads, kv_heads, size, window, shared):
    batch = groups_of(0).to(GPU)
    sharing = sharing_of(batch) if shared else None
    tokens = len(sharing.kept_U) if shared else batch.tokens
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = [*((1, h, tokens, size) for h in (heads, kv_heads, kv_heads)), (heads,)]
    low = [torch.randn(s, generator=generator, device=GPU).bfloat16().requires_grad_() for s in shapes]
    exact = [x.detach().float().requires_grad_() for x in low]
    up = torch.randn(1, tokens, heads, size, generator=generator, device=GPU)
    results = []
    for inputs, layout in (
        (low, packed_layout(batch.bounds, GPU, torch.bfloat16, sharing=sharing)),
        (exact, PackedLayout(batch.bounds, GPU, sharing)),
    ):
        out = layout.attend(*inputs[:3], Ask(0, size**-0.5, window, None, inputs[3]))
        out.backward(up.to(out.dtype))
        results.append([out.detach(), *(x.grad for x in inputs)])
    assert isinstance(packed_layout(batch.bounds, GPU, torch.bfloat16), FlashLayout)
    for found, want in zip(*results, strict=True):
        close(found, want, 0.02)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (14, 2, 64), (8, 8, 128), (4, 4, 40)])
def test_flash_layout_equals_the_padded_one_in_float32(heads, kv_heads, size, window):
    lengths = [1, 300, 17, 64, 5, 129]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(bounds[-1])
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = [(1, h, tokens, size) for h in (heads, kv_heads, kv_heads)]
    low = [torch.randn(s, generator=generator, device=GPU).bfloat16().requires_grad_() for s in shapes]
    exact = [x.detach().float().requires_grad_() for x in low]
    up = torch.randn(1, tokens, heads, size, generator=generator, device=GPU)
    results = []
    for inputs, layout in ((low, packed_layout(bounds, GPU, torch.bfloat16)), (exact, PackedLayout(bounds, GPU))):
        out = layout.attend(*inputs, Ask(0, size**-0.5, window))
        out.backward(up.to(out.dtype))
        results.append([out.detach(), *(x.grad for x in inputs)])
    assert isinstance(packed_layout(bounds, GPU, torch.bfloat16), FlashLayout)
    for found, want in zip(*results, strict=True):
        close(found, want, 0.01)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (14, 2, 64), (8, 8, 128), (4, 4, 40), (2, 2, 36)])
def test_flash_layout_with_shared_prompts_equals_the_padded_one_without_in_float32(heads, kv_heads, size, window):
    batch = groups_of(0).to(GPU)
    sharing = sharing_of(batch)
    tokens = len(sharing.kept_U)
    assert tokens < 0.7 * batch.tokens
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = [(1, h, tokens, size) for h in (heads, kv_heads, kv_heads)]
    low = [torch.randn(s, generator=generator, device=GPU).bfloat16().requires_grad_() for s in shapes]
    exact = [x.detach().float().requires_grad_() for x in low]
    up = torch.randn(1, tokens, heads, size, generator=generator, device=GPU)
    ask = Ask(0, size**-0.5, window)

    found = packed_layout(batch.bounds, GPU, torch.bfloat16, sharing=sharing).attend(*low, ask)
    found.backward(up.bfloat16())
    whole = [x[:, :, sharing.place_T] for x in exact]
    want = PackedLayout(batch.bounds, GPU).attend(*whole, ask)[:, sharing.kept_U]
    want.backward(up)
    for a, b in zip([found.detach(), *(x.grad for x in low)], [want.detach(), *(x.grad for x in exact)], strict=True):
        close(a, b, 0.01 if size % 8 == 0 else 0.02)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_training_with_shared_prompts_equals_float32_without(compile):
    trainer, exact = trainer_of(compile=compile, token_budget=1500), trainer_of(dtype="float32", device="cpu")
    batch = groups_of(0)
    trainer.forward_backward(batch)
    exact.forward_backward(batch.unshared())
    assert compile == "off" or trainer.model.blocks.working
    for weight, want in exact.weights.items():
        if "k_proj.bias" not in weight:
            close(trainer.weights[weight].grad.cpu(), want.grad, 0.06)
    gap_T = trainer.score(batch).logp_T.cpu() - exact.score(batch.unshared()).logp_T
    assert gap_T.abs().max() < 0.1
    batch = groups_of(1)
    assert len(waits(lambda: trainer.forward_backward(batch))) == 1


def test_compiled_layers_with_shared_prompts_are_one_graph_more():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    trainer = trainer_of(compile="on", token_budget=10_000)
    for seed, samples in enumerate([(8, 1, 4, 6), (5, 2, 7), (3, 16)]):
        trainer.forward_backward(groups_of(seed, samples))
    assert counters["stats"]["unique_graphs"] == 1
    # Also where one micro-batch of a step shares nothing, which would be compiled for in the midst of a run.
    batch = groups_of(0, (1, 1, 8))
    for trainer.token_budget, lone in ((400, 3), (300, 1)):
        micros = [share.batch for share in shares(batch, trainer.token_budget, World())]
        assert lone in [micro.segments for micro in micros if len(set(micro.group_S.tolist())) == micro.segments]
        trainer.forward_backward(batch)
    assert counters["stats"]["unique_graphs"] == 1
    for seed, lengths in enumerate([(200, 30, 77), (5, 9, 300, 41)]):
        trainer.forward_backward(batch_of(seed, lengths))
    assert trainer.model.blocks.working
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("size", [36, 320])
def test_heads_that_the_kernel_does_not_take_are_padded(size):
    bounds = torch.tensor([0, 5, 40])
    inputs = [torch.randn(1, 2, 40, size, device=GPU, dtype=torch.bfloat16) for _ in range(3)]
    found, want = (layout(bounds, GPU).attend(*inputs, Ask(0, None, None)) for layout in (FlashLayout, PackedLayout))
    assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1000, 151_936])
def test_log_prob_kernels_equal_float64(dtype, vocabulary):
    generator = torch.Generator(GPU).manual_seed(0)
    logits = (4 * torch.randn(300, vocabulary, generator=generator, device=GPU)).to(dtype)
    target = torch.randint(vocabulary, (300,), generator=generator, device=GPU)
    up = torch.randn(2, 300, generator=generator, device=GPU)
    leaf = logits.double().requires_grad_()
    log_p = (leaf / 0.7).log_softmax(-1)
    logp, entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    ((up[0] * logp).sum() + (up[1] * entropy).sum()).backward()
    logsumexp, own_logp, own_entropy = logprob.row_stats(logits, target, 0.7, entropy=True)
    torch.testing.assert_close(own_logp.double(), logp.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(own_entropy.double(), entropy.detach(), rtol=0, atol=2e-5)
    gradient = logprob.logits_gradient_(
        logits, target, logsumexp, up[0], 0.7, entropy_n=own_entropy, grad_entropy_n=up[1]
    )
    close(gradient, leaf.grad, torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5)


def test_rows_beyond_two_to_the_31_logits():
    logits = torch.zeros(14_200, 151_936, device=GPU, dtype=torch.bfloat16)
    logits[-1, 7] = 30.0
    target = torch.full((14_200,), 7, device=GPU)
    _, logp, _ = logprob.row_stats(logits, target, 1.0, entropy=False)
    assert logp[-1].abs() < 1e-3
    assert (logp[:-1] + torch.tensor(151_936.0).log().item()).abs().max() < 1e-3


@pytest.mark.parametrize("elsewhere", [False, True])
def test_gradient_of_the_head_against_float64(elsewhere):
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000, bias=False, device=GPU, dtype=torch.bfloat16)
    hidden = torch.randn(700, 64, device=GPU).bfloat16().requires_grad_()
    target = torch.randint(5000, (700,), device=GPU)
    exact_head = copy.deepcopy(head).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    gathered = torch.zeros(5000, 64, device=GPU)
    losses = []
    for h, x in ((head, hidden), (exact_head, exact_hidden)):
        logp, entropy, _ = chunked_head(
            h, x, target, temperature=0.7, chunk_tokens=256, entropy=True, entropy_grad=True,
            weight_gradient=(lambda: gathered) if elsewhere and h is head else None,
        )  # fmt: skip
        losses.append(logp.sum() + 0.1 * entropy.sum())
        losses[-1].backward()
    assert abs(losses[0] - losses[1]) < 1e-3 * abs(losses[1])
    close(hidden.grad, exact_hidden.grad, 0.01)
    close(gathered if elsewhere else head.weight.grad, exact_head.weight.grad, 0.01)


def test_memory_of_log_probs_of_16k_tokens_and_a_vocabulary_of_152k():
    tokens, vocabulary, size = 16_384, 151_936, 1536
    head = torch.nn.Linear(size, vocabulary, bias=False, device=GPU, dtype=torch.bfloat16)
    hidden = torch.randn(tokens, size, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(vocabulary, (tokens,), device=GPU)
    # The float32 gradient is a trainer's own, there whatever computes the log-probs.
    gradient = torch.zeros(vocabulary, size, device=GPU)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = {"entropy_grad": True, "weight_gradient": lambda: gradient}
    logp, entropy, _ = chunked_head(head, hidden, target, entropy=True, **gradients)
    (logp.sum() + 0.01 * entropy.sum()).backward()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    print(f"log-probs, entropies and their gradients: {peak:.2f} GB")
    assert peak < 1.5


def negative_logp(out, batch):
    return TokenLoss(loss_T=-out.logp_T, metrics_T={"nll": -out.logp_T})


def batch_of(seed, lengths=(200, 30, 77, 121, 5)):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return stamp_weights(pack([Sequence(token_ids=i, trainable=[False] + [True] * (len(i) - 1)) for i in ids]), "token")


def groups_of(seed, samples=(8, 1, 4, 6)):
    """A prompt for each number, of another length, and as many answers to it."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for count in samples:
        prompt = tokens(30, 200)
        for own in (tokens(1, 120) for _ in range(count)):
            rows.append(Sequence(token_ids=prompt + own, trainable=[False] * len(prompt) + [True] * len(own)))
    return stamp_weights(pack(rows), "token")


def trainer_of(dtype="bfloat16", compile="off", token_budget=256, device="cuda", **optim):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=512, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    model = prepare_module(
        AutoModelForCausalLM.from_config(config).eval(), make_tokenizer(), dtype=dtype, device=device
    )
    params = OptimParams(learning_rate=1e-3, total_steps=100, **optim)
    return LocalTrainer(model, negative_logp, params, token_budget=token_budget, compile=compile)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "muon"])
def test_each_optimizer_learns_gives_its_memory_away_and_resumes(optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    first, resumed = (trainer_of(optimizer=optimizer, ema_decay=0.9) for _ in range(2))
    start = first.evaluate(batch_of(0))["loss"]
    for _ in range(3):
        first.forward_backward(batch_of(0))
        first.optim_step()
    assert first.evaluate(batch_of(0))["loss"] < start
    resumed.load_state_dict(first.state_dict())
    first.park("weights")
    kept = [*first.optimizer.tensors(), *first.ema.values()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor.is_cuda) == 0
    first.unpark()
    for trainer in (first, resumed):
        trainer.forward_backward(batch_of(1))
        trainer.optim_step()
    for name, weight in first.weights.items():
        close(resumed.weights[name].detach(), weight.detach(), 1e-2)
        close(resumed.ema[name], first.ema[name], 1e-2)


def waits(call):
    """How often the host waited for the device during the call."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_step_waits_for_the_device_twice(compile):
    trainer = trainer_of(compile=compile)
    trainer.forward_backward(batch_of(0))
    trainer.optim_step()
    batch = batch_of(1)
    # Three micro-batches; their numbers are read together, then the gradient's norm.
    assert len(waits(lambda: trainer.forward_backward(batch))) == 1
    assert len(waits(trainer.optim_step)) == 1


def test_training_equals_float32_on_the_cpu_and_compiled_layers_agree():
    trainers = {
        "exact": trainer_of(dtype="float32", device="cpu"),
        "bfloat16": trainer_of(),
        "compiled": trainer_of(compile="on"),
    }
    for trainer in trainers.values():
        trainer.forward_backward(batch_of(0))
    assert trainers["compiled"].model.blocks.working
    exact = {name: w.grad for name, w in trainers["exact"].weights.items()}
    for name in ("bfloat16", "compiled"):
        for weight, want in exact.items():
            if "k_proj.bias" in weight:
                continue  # It shifts a row of attention scores: its gradient is rounding.
            close(trainers[name].weights[weight].grad.cpu(), want, 0.06)
    scores = {name: trainer.score(batch_of(3)).logp_T.cpu() for name, trainer in trainers.items()}
    for name in ("bfloat16", "compiled"):
        assert (scores[name] - scores["exact"]).abs().max() < 0.1


def test_compiled_layers_are_one_graph_for_all_lengths():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    trainer = trainer_of(compile="on", token_budget=10_000)
    for seed, lengths in enumerate([(200, 30, 77), (5, 9, 300, 41), (64, 64)]):
        trainer.forward_backward(batch_of(seed, lengths))
    assert trainer.model.blocks.working
    assert counters["stats"]["unique_graphs"] == 1
