"""Models whose layers keep a state: sampled side by side in slots, trained packed, each as one sequence at a time."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine_models import tokenizer
from helpers.family_models import made
from torch.distributed import HashStore
from transformers import GlmMoeDsaPreTrainedModel

from tandem.batch import Batch, Outputs, TokenLoss
from tandem.data.packing import pack, stamp_weights
from tandem.engines.live.engine import LiveEngine
from tandem.engines.live.fitting import STATE_COPIES, Fitting
from tandem.engines.live.states import StateStore
from tandem.errors import UserError
from tandem.models.forward import forward
from tandem.models.loading import load_causal, prepare_module
from tandem.models.lora.adapters import AdapterParams
from tandem.models.quantized.layers import quantized_in
from tandem.models.recurrent.states import Held, Mixers
from tandem.parallel.sharding import whole
from tandem.parallel.world import World, join
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer, MemoryParams
from tandem.types import Request, SamplingParams, Sequence


def asks(count: int, **sampling: Any) -> list[Request]:
    """Prompts of which some are of one length, two samples of each, that end at several times."""
    return [
        Request(
            prompt_ids=tuple(2 + (7 * i + j * j) % 60 for j in range((4, 1, 9, 4, 2)[i % 5])),
            seeds=(2 * i, 2 * i + 1),
            sampling=SamplingParams(max_new_tokens=(5, 12, 1, 9)[i % 4], **sampling),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "way", "slots"),
    [
        ("qwen3-next", "slots", 3),
        ("qwen3-next", "captured", 3),
        ("zamba", "slots", 3),
        ("falcon-h1", "captured", 3),
        ("mamba", "captured", 20),
        ("gemma4-e", "captured", 3),
        ("recurrent-gemma", "captured", 3),
        ("rwkv", "captured", 3),
    ],
)
def test_what_a_sample_is_given_does_not_depend_on_those_beside_it(name: str, way: Any, slots: int) -> None:
    """In float64. With fewer slots than samples some enter and take the slots of others, which move; with as many,
    those that go on longest move down where fewer rows hold them."""
    module = made(name).double()
    module.set_experts_implementation("eager")  # The grouped products of others know no float64.
    model = prepare_module(module, tokenizer())
    truth = copy.deepcopy(module)
    engine = LiveEngine(model.module, tokenizer(), way=way, max_slots=slots, prefill_tokens=12)
    if way == "captured":
        assert engine.fitting is not None
        assert (engine.fitting.lean is None) is (name in ("zamba", "recurrent-gemma", "rwkv"))
    asked = [*asks(5, temperature=0), *asks(5, temperature=1.0)]
    if slots > 3:
        ends = SamplingParams(max_new_tokens=60, temperature=1.0, stop_token_ids=tuple(range(10, 16)))
        asked = [Request(prompt_ids=(5, 6, 7 + i), seeds=(2 * i, 2 * i + 1), sampling=ends) for i in range(10)]
    for request, samples in zip(asked, engine.generate(asked), strict=True):
        for sample in samples:
            ids = torch.tensor([[*request.prompt_ids, *sample.token_ids]])
            with torch.no_grad():
                logits = truth(input_ids=ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].double()
            if not request.sampling.temperature:
                assert sample.token_ids == logits.argmax(-1).tolist()
            logp = logits.log_softmax(-1).gather(1, ids[0, len(request.prompt_ids) :, None]).squeeze(1)
            assert (logp - torch.tensor(sample.untruncated_logp)).abs().max() < 5e-5


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in ("mamba", "mamba2", "falcon-mamba")]
    + [(name, torch.float32) for name in ("mamba2", "falcon-mamba")],
)
def test_mambas_are_fused_in_both_types(name: str, dtype: torch.dtype) -> None:
    """What they sample has the log-probs that they are trained on."""
    model = prepare_module(made(name), tokenizer())
    model.compute_in(dtype)
    engine = LiveEngine(model.module, tokenizer(), way="captured", max_slots=4)
    assert engine.fitting is not None
    assert engine.fitting.lean is not None
    assert engine.fitting.lean.decoder.residual is (torch.float32 if dtype == torch.bfloat16 else None)
    asked = asks(4, temperature=1.0)
    for request, samples in zip(asked, engine.generate(asked), strict=True):
        for sample in samples:
            ids = torch.tensor([[*request.prompt_ids, *sample.token_ids]])
            with torch.no_grad():
                logits = model.module(input_ids=ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
            logp = logits.float().log_softmax(-1).gather(1, ids[0, len(request.prompt_ids) :, None]).squeeze(1)
            gap = (logp - torch.tensor(sample.untruncated_logp)).abs().max()
            assert gap < (0.05 if dtype == torch.bfloat16 else 1e-4), gap


def test_where_states_leave_room_for_few_rows_the_decoder_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, made_with = made("mamba"), []
    make = Fitting.make

    def noted(self: Fitting, *args: Any, **options: Any) -> Any:
        refused = make(self, *args, **options)
        made_with.append(self.decoder.slots if self.decoder is not None else 0)
        return refused

    monkeypatch.setattr(Fitting, "_free", lambda self, theirs: 2 * STATE_COPIES * 3 * self.shape.state_bytes)
    monkeypatch.setattr(Fitting, "make", noted)
    engine = LiveEngine(prepare_module(module, tokenizer()).module, tokenizer(), way="captured", max_slots=8)
    for count in (2, 5, 5):
        engine.generate(asks(count))
    assert made_with == [3, 3]
    [said] = [line for line in caplog.messages if "side by side" in line]
    assert "3 samples side by side, not 4 (slower)" in said


def rows() -> Batch:
    """Two groups of samples with a prompt each, and one sequence by itself."""
    first, second = [5, 6, 7, 8, 9, 10, 11], [20, 21, 22]
    texts = [(first, [30, 31]), (first, [40]), (first, [50, 51, 52, 53, 54]), (second, [60, 61, 62]), (second, [63])]
    sequences = [
        Sequence(token_ids=prompt + own, trainable=[False] * len(prompt) + [True] * len(own)) for prompt, own in texts
    ]
    sequences.append(Sequence(token_ids=list(range(2, 40)), trainable=[False] + [True] * 37))
    return stamp_weights(pack(sequences, prompt_lengths=[len(prompt) for prompt, _ in texts] + [0]), "token")


@pytest.mark.parametrize("name", ["qwen3-next", "lfm2", "zamba", "mamba2", "recurrent-gemma", "rwkv"])
def test_packed_segments_are_what_each_is_by_itself(name: str) -> None:
    """Also those whose prompt goes through once, in all but the layers with a state."""
    model = prepare_module(made(name), tokenizer())
    assert model.packed
    assert model.mixers is not None
    found = []
    for batch in (rows(), rows().unshared()):
        out = forward(model, batch)
        assert out.logp_T is not None
        (-out.logp_T * batch.weight_T).sum().backward()
        found.append(
            (out.logp_T.detach(), {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None})
        )
        model.module.zero_grad()
    alone = [
        forward(model, stamp_weights(rows().unshared().select([s]), "token")).logp_T for s in range(rows().segments)
    ]
    for logp_T, gradients in found:
        assert (logp_T - torch.cat(alone)).abs().max() < 1e-4
        for parameter, gradient in gradients.items():
            other = found[1][1][parameter]
            assert (gradient - other).norm() <= 2e-5 * other.norm() + 1e-7, parameter
    # Outside of a packed forward they are what they were.
    assert not any("forward" in vars(part) for part in model.mixers.parts)


def test_states_that_are_not_kept_apart_are_found_by_the_probes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A convolution that sees the segment before it in training; one that starts from nothing where it decodes."""
    with monkeypatch.context() as patch:
        patch.setattr(Mixers, "apart", lambda self, layout, told=None: nullcontext())
        assert not prepare_module(made("lfm2"), tokenizer()).packed
    assert "packed sequences do not reproduce its own forward" in caplog.text
    model = prepare_module(made("lfm2"), tokenizer())
    with monkeypatch.context() as patch:
        load = StateStore.load
        patch.setattr(StateStore, "load", lambda self, states, row_N, slot_N: load(self, states, row_N * 0, slot_N))
        assert LiveEngine(model.module, tokenizer()).way == "padded"
        with pytest.raises(UserError, match="does not reproduce its own forward"):
            LiveEngine(model.module, tokenizer(), way="captured")
    for name in ("recurrent-gemma", "rwkv"):
        others = prepare_module(made(name), tokenizer())
        with monkeypatch.context() as patch:
            # What a class keeps elsewhere is what it was when the prompt ended.
            patch.setattr(
                StateStore, "held", lambda self, rows: Held([1], {n: x[:rows].clone() for n, x in self.states.items()})
            )
            with pytest.raises(UserError, match="does not reproduce its own forward"):
                LiveEngine(others.module, tokenizer(), way="captured")
    with pytest.raises(UserError, match="MambaForCausalLM keeps no keys and values"):
        LiveEngine(made("mamba"), tokenizer(), way="captured", kv_cache_dtype="fp8")
    model.compile_blocks("on")
    assert "its layers are not compiled: they keep states" in caplog.text


def test_a_shared_prompt_counts_for_every_segment_in_the_token_budget() -> None:
    """Layers with a state see it in each."""
    model = prepare_module(made("lfm2"), tokenizer())
    trainer = LocalTrainer(
        model,
        loss,
        OptimParams(learning_rate=1e-4, total_steps=1),
        token_budget=20,
        world=World(),
        memory=MemoryParams(),
    )
    found = [share.batch for share in trainer._shares(rows())]
    assert [batch.lengths for batch in found] == [[9, 8], [12, 6], [4], [38]]
    assert all(batch.prefix_S is not None for batch in found)


def loss(out: Outputs, batch: Batch) -> TokenLoss:
    assert out.logp_T is not None
    return TokenLoss(loss_T=-out.logp_T, metrics_T={})


def test_layers_that_are_computed_again_in_the_backward_pass_are_padded() -> None:
    """They would be computed without knowing where segments begin."""
    norms = []
    for memory in (MemoryParams(), MemoryParams(activation_checkpointing=True)):
        model = prepare_module(made("lfm2"), tokenizer())
        optim = OptimParams(learning_rate=1e-4, total_steps=1)
        trainer = LocalTrainer(model, loss, optim, token_budget=60, world=World(), memory=memory)
        assert model.packed is not memory.activation_checkpointing
        trainer.forward_backward(rows())
        norms.append(trainer.optim_step()["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("name", ["zamba", "falcon-mamba"])
def test_sharded_they_are_what_they_were(name: str) -> None:
    """Zamba's layers have parameters in common, Falcon Mamba's parts that are named beside what they are in."""
    model = prepare_module(made(name), tokenizer())
    found = []
    with join(0, 1, device=torch.device("cpu"), host="", port=0, store=HashStore()) as world:
        for sharded in (False, True):
            if sharded:
                model.shard(world)
            batch = rows()
            logp_T = forward(model, batch).logp_T
            assert logp_T is not None
            (-logp_T * batch.weight_T).sum().backward()
            gradients = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
            found.append((logp_T.detach(), {n: whole(gradient).clone() for n, gradient in gradients.items()}))
            model.module.zero_grad()
    (logp_T, gradients), (other_T, others) = found
    assert (logp_T - other_T).abs().max() < 1e-5
    assert gradients.keys() == others.keys()
    assert all((gradients[name] - others[name]).abs().max() < 1e-5 for name in gradients)


def test_a_hybrid_without_experts_has_no_loss_that_balances_them() -> None:
    model = prepare_module(made("granite4"), tokenizer())
    with pytest.raises(UserError, match=r"aux_loss_coef: .* no experts"):
        model.require_balance()


def test_few_bits_and_adapters_where_a_module_shares_weights_or_reads_them_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")

    def load(name: str, *targets: str, **options: Any) -> Any:
        made(name).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        params = AdapterParams(rank=2, targets=targets, **options)
        return load_causal(tmp_path / name, device="cpu", adapters=params)

    with pytest.raises(UserError, match=r"lora.quantize: the weight of .*q_proj in Zamba"):
        load("zamba", "in_proj", quantize="fp8")
    assert "change nothing" not in caplog.text
    # Of a model that nobody has written down it is found out.
    monkeypatch.setattr("tandem.models.lora.targets.READ_PAST", {})
    monkeypatch.setattr("tandem.models.quantized.layers.READ_PAST", {})
    with pytest.raises(UserError, match=r"lora.quantize: MambaForCausalLM does not compute with layers in few bits"):
        load("mamba", "in_proj", quantize="fp8")
    load("jamba", "dt_proj", "in_proj")
    assert "adapters on dt_proj change nothing" in caplog.text
    # It gives one of its layers numbers of the type that the weight has: of codes they were made whole ones.
    few = quantized_in(load("glm5", "q_a_proj", quantize="fp8").module)
    assert {name.rpartition(".")[2] for name in few if "indexer" in name} == {"wk", "wq_b"}
    with monkeypatch.context() as patch:
        patch.setattr(GlmMoeDsaPreTrainedModel, "_keep_in_fp32_modules", None)
        with pytest.raises(UserError, match=r"lora.quantize: GlmMoeDsaForCausalLM does not compute with layers in few"):
            load("glm5", "q_a_proj", quantize="fp8")
