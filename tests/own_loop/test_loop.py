"""A sampler beside somebody's own loop: in this process, and on two real ranks over gloo."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.models import make_module, make_tokenizer
from helpers.ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tandem.errors import UserError
from tandem.own_loop.sampler import Sampler
from tandem.parallel.gather import Gatherer
from tandem.parallel.world import World
from tandem.sync.check import WeightMismatch
from tandem.types import SamplingParams

PROMPTS: list[Any] = ["hello", [5, 6, 7], "a=1;", "what is this?", "x"]
SAMPLING = SamplingParams(max_new_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_module("llama", seed=0), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def ready(folder) -> Iterator[Sampler]:
    with Sampler(folder, max_length=100) as sampler:
        sampler.update(trained(), 1)
        yield sampler


def save(module: Any, path: Path) -> str:
    module.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def trained() -> Any:
    """The loop's model: other weights than the folder's."""
    return make_module("llama", seed=1)


def greedy(module: Any, prompt: Any, tokens: int) -> list[int]:
    """What transformers' own generate gives."""
    ids = torch.tensor([make_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
    done = module.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=1, pad_token_id=0)
    return done[0, ids.shape[1] :].tolist()


def held(sampler: Sampler) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in sampler.engine.engine.parameters.items()}  # type: ignore[attr-defined]


def assert_holds(sampler: Sampler, module: Any) -> None:
    wanted = dict(module.named_parameters())
    mine = held(sampler)
    assert mine.keys() == wanted.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, wanted[name].detach().to(tensor.dtype)), name


def test_it_samples_from_the_model_that_it_was_given(folder):
    with Sampler(folder) as sampler:
        assert sampler.update(trained(), 5) is True
        assert_holds(sampler, trained())
        texts = sampler.generate(PROMPTS, max_new_tokens=20, temperature=0)
    tokenizer = make_tokenizer()
    assert texts == [tokenizer.decode(greedy(trained(), p, 20), skip_special_tokens=True) for p in PROMPTS]
    assert texts != [tokenizer.decode(greedy(make_module("llama"), p, 20), skip_special_tokens=True) for p in PROMPTS]


def test_an_equal_step_is_skipped_and_an_earlier_one_is_not(folder):
    module = trained()
    with Sampler(folder) as sampler:
        assert sampler.update(module, 5)
        with torch.no_grad():
            module.model.norm.weight.mul_(2.0)
        assert sampler.update(module, 5) is False
        assert_holds(sampler, trained())
        assert sampler.update(module, 4) is True
        assert_holds(sampler, module)
        assert sampler.step == 4


def test_n_texts_a_prompt_in_order_and_again_the_same(folder):
    with Sampler(folder, seed=3) as sampler:
        sampler.update(trained(), 5)
        groups = sampler.completions(PROMPTS, SAMPLING, n=3)
        texts = sampler.generate(PROMPTS, max_new_tokens=12, temperature=1.0, n=3)
        sampler.update(trained(), 6)
        later = sampler.generate(PROMPTS, max_new_tokens=12, temperature=1.0, n=3)
    assert texts == [completion.text for group in groups for completion in group]
    assert len(set(texts)) > len(PROMPTS)
    assert later != texts
    assert {(c.version_min, c.version_max) for group in groups for c in group} == {(5, 5)}


def test_chat_messages_and_stop_strings(folder, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}:{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    make_module("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with Sampler(tmp_path) as sampler:
        sampler.update(trained(), 1)
        chat, plain = sampler.generate([[{"role": "user", "content": "hi"}], "hi:>"], temperature=0, max_new_tokens=16)
        assert chat == plain
        stop = plain[4]
        assert sampler.generate(["hi:>"], temperature=0, stop=stop) == [plain[: plain.index(stop)]]


def test_the_model_stays_as_it_was(folder):
    module = trained().train()
    for layer in module.model.layers:
        layer.self_attn.attention_dropout = 0.5
    module.model.layers[0].eval()
    modes = {name: m.training for name, m in module.named_modules()}
    random = torch.get_rng_state()
    with Sampler(folder) as sampler:
        # The probe of the first update would see the dropout.
        sampler.update(module, 1)
        sampler.generate(PROMPTS, max_new_tokens=4)
    assert {name: m.training for name, m in module.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_a_wrapped_model_keeps_its_names(folder):
    module = trained()
    module.model.layers[0] = checkpoint_wrapper(module.model.layers[0])
    module.model.layers[1] = torch.compile(module.model.layers[1], backend="eager")
    with Sampler(folder) as sampler:
        sampler.update(torch.compile(module, backend="eager"), 1)
        assert_holds(sampler, trained())


def test_a_bfloat16_sampler_of_a_float32_model(folder):
    with Sampler(folder, dtype="bfloat16") as sampler:
        sampler.update(trained(), 1)
        assert {tensor.dtype for tensor in held(sampler).values()} == {torch.bfloat16}
        assert_holds(sampler, trained())
        assert len(sampler.generate(PROMPTS)) == len(PROMPTS)


def test_a_float32_sampler_of_a_bfloat16_model(folder):
    with Sampler(folder) as sampler:
        sampler.update(trained().to(torch.bfloat16), 1)
        assert_holds(sampler, trained().to(torch.bfloat16))


def test_ids_and_steps_of_tensors_and_of_numpy(folder, tmp_path):
    ids: list[Any] = [torch.tensor([5, 6, 7]), np.array([5, 6, 7]), [np.int64(5), torch.tensor(6), 7]]
    with Sampler(folder) as sampler:
        sampler.update(trained(), torch.tensor(3))  # type: ignore[arg-type]
        assert sampler.update(trained(), np.int64(3)) is False  # type: ignore[arg-type]
        assert len(set(sampler.generate([*ids, [5, 6, 7]], temperature=0))) == 1
        assert sampler.log(ids, 3, path=tmp_path / "samples.jsonl", every=1)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [[5, 6, 7]] * 3


def test_an_autocast_of_the_loop_is_not_the_samplers(folder):
    with Sampler(folder) as sampler:
        sampler.update(trained(), 1)
        wanted = sampler.completions(PROMPTS, SAMPLING)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert sampler.completions(PROMPTS, SAMPLING) == wanted


def test_threads_take_turns(folder):
    """No sample is drawn from weights that are half there."""
    models = [make_module("llama", seed=seed) for seed in (1, 2)]
    said: set[tuple[str, ...]] = set()
    with Sampler(folder, check_weights=False) as sampler:
        wanted = set()
        for module in models:
            sampler.update(module, 1 - (sampler.step or 0))
            wanted.add(tuple(sampler.generate(PROMPTS, temperature=0, max_new_tokens=8)))
        done = threading.Event()

        def sample() -> None:
            while not done.is_set():
                said.add(tuple(sampler.generate(PROMPTS, temperature=0, max_new_tokens=8)))

        with ThreadPoolExecutor(1) as threads:
            sampling = threads.submit(sample)
            for step in range(2, 40):
                sampler.update(models[step % 2], step)
                if sampling.done():
                    break
            done.set()
            sampling.result()
    assert said <= wanted


def test_samples_go_to_a_file_every_few_steps(folder, tmp_path):
    path = tmp_path / "logs" / "samples.jsonl"
    with Sampler(folder) as sampler:
        said = []
        for step in range(1, 5):
            sampler.update(trained(), step)
            said.append(sampler.log(["hello", [5, 6]], step, path=path, every=2, n=2, max_new_tokens=6))
        assert said == [False, True, False, True]
        wanted = sampler.completions(["hello", [5, 6]], SamplingParams(max_new_tokens=6, temperature=0.7), n=2)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == [2] * 4 + [4] * 4
        assert [line["prompt"] for line in lines[4:]] == ["hello", "hello", [5, 6], [5, 6]]
        for line, completion in zip(lines[4:], [c for group in wanted for c in group], strict=True):
            assert line["completion"] == completion.text
            assert line["tokens"] == len(completion.token_ids)
            assert line["mean_logprob"] == pytest.approx(sum(completion.behaviour_logp) / line["tokens"], abs=1e-5)
            assert line["weights_step"] == 4
        with pytest.raises(UserError, match="cannot write"):
            sampler.log(["hello"], 4, path=path / "below_a_file", every=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.generate("hello"), "prompts is one string; give a list"),
        (lambda s: s.generate(make_tokenizer()(["hello"])), "prompts is a mapping; give a list"),
        (lambda s: s.generate(["hello", None]), "prompt 1: None; it must be a string, a list of messages, or of token"),
        (lambda s: s.generate(None), "prompts is None; give a list"),
        (lambda s: s.generate(["hello"], n="2"), "n is '2'; it must be a whole number"),
        (lambda s: s.generate(["hello"], max_new_tokens=5.0), "max_new_tokens is 5.0; it must be a whole number, at"),
        (lambda s: s.generate(["hello"], temperature="1"), "temperature is '1'; it must be 0"),
        (lambda s: s.generate(["hello"], top_k=None), "top_k is None; it must be a whole number"),
        (lambda s: s.generate(["hello"], stop=5), "stop is 5; it must be strings that are not empty"),
        (lambda s: s.generate(["hello"], stop_token_ids=["a"]), r"stop_token_ids is \('a',\); it must be whole num"),
        (lambda s: s.completions(["hello"], None), "sampling is None; give tandem.SamplingParams"),
        (lambda s: s.update(trained(), 1.5), "step is 1.5; it must be a whole number"),
        (lambda s: s.update(trained().state_dict(), 2), "a OrderedDict is no model; give the module itself"),
        (lambda s: s.generate(["hello"], n=0), "n is 0"),
        (lambda s: s.generate(torch.tensor(3)), r"prompts is tensor\(3\); give a list of prompts"),
        (lambda s: s.generate(["hello", ""]), "prompt 1: column 'prompt' is empty"),
        (lambda s: s.generate(["hello", []]), "request 1: the prompt is empty"),
        (lambda s: s.generate([[5], [6, 64]]), "request 1: token id 64 at position 1 is outside"),
        (lambda s: s.generate(["hello"], max_new_tokens=96), "above the sampler's max_length of 100"),
        (lambda s: s.generate(["hello"], temperature=-1), "temperature is -1"),
        (lambda s: s.generate([[{"role": "user", "content": "hi"}]]), "prompt 0: .*no chat template"),
        (lambda s: s.log(["hello"], 4, every=0), "every is 0"),
        (lambda s: s.log(["hello"], 4, every="2"), "every is '2'; it must be a whole number"),
        (lambda s: s.log(["hello"], "50"), "log: step is '50'; it must be a whole number"),
        (lambda s: s.log(["hello"], 50, path=None), "log: path is None; it must be the name of a file"),
    ],
)
def test_what_cannot_be_sampled(ready, call, words):
    with pytest.raises(UserError, match=words):
        call(ready)
    assert len(ready.generate(["hello"], max_new_tokens=4)) == 1


def test_a_loop_may_make_and_call_it_inside_inference_mode(folder):
    """What it makes there is none of inference mode's: later calls, and the model's own training, go on."""
    module = trained()
    with torch.inference_mode():
        sampler = Sampler(folder)
        sampler.update(module, 1)
        first = sampler.generate(iter(PROMPTS), max_new_tokens=4)
    module(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    assert sampler.generate(PROMPTS, max_new_tokens=4) == first
    assert sampler.update(module, 2)
    with torch.inference_mode():
        assert sampler.update(module, 3)
    tensors = [*sampler.engine.engine.parameters.values(), *sampler.engine.engine.model.module.buffers()]
    assert not any(tensor.is_inference() for tensor in [*tensors, *module.buffers()])
    sampler.close()


def test_before_the_first_update_and_after_the_end(folder):
    with Sampler(folder) as sampler, pytest.raises(UserError, match=r"call update\(model, step\) first"):
        sampler.generate(["hello"])
    with pytest.raises(UserError, match="call update"):
        sampler.generate(["hello"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "vlm"}, "engine is 'vlm'; it must be 'live' or 'vllm'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"device": "cuda"}, "torch sees no GPU here"),
        ({"device": "gpu"}, "none that Tandem computes on"),
        ({"arguments": {"enforce_eager": True}}, "arguments is for engine='vllm'"),
        ({"max_slots": 0}, "max_slots is 0"),
        ({"max_slots": "8"}, "max_slots is '8'; it must be a whole number"),
        ({"max_length": 1}, "max_length is 1; it must be at least 2"),
        ({"seed": None}, "seed is None; it must be a whole number"),
    ],
)
def test_options_that_cannot_work(folder, options, words):
    with pytest.raises(UserError, match=words):
        Sampler(folder, **options)


def test_processes_that_have_not_met(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one of 2 processes and they have not met; call"):
        Sampler(folder)


def with_adapter() -> Any:
    module = trained()
    module.model.layers[0].lora_A = nn.Linear(2, 2)
    return module


def resized() -> Any:
    module = trained()
    module.resize_token_embeddings(70)
    return module


def in_integers() -> Any:
    module = trained()
    norm = module.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().to(torch.int8), requires_grad=False)
    return module


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = trained()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: make_module("qwen2"),
            r"the model has model\.layers\.0\.self_attn\.q_proj\.bias, .* 3 more, which the",
        ),
        (lambda: make_module("gpt_neox"), r"and lacks model\.embed_tokens\.weight.*; save the model that you train"),
        (resized, r"embed_tokens\.weight has shape \(70, 32\) and \(64, 32\) in the sampler; save"),
        (with_adapter, r"layers\.0\.lora_A\.weight is an adapter's parameter; give the model with its adapters merged"),
        (in_integers, r"model\.norm\.weight is torch\.int8, a quantized weight"),
        (Outer, "Outer is no transformers model; give the one inside it"),
    ],
)
def test_a_model_that_is_not_the_samplers(folder, make, words):
    with Sampler(folder) as sampler:
        sampler.update(trained(), 1)
        with pytest.raises(UserError, match=words):
            sampler.update(make(), 2)
        # Nothing has been done: it holds what it held.
        assert_holds(sampler, trained())
        assert sampler.step == 1
        assert len(sampler.generate(["hello"], max_new_tokens=4)) == 1
        assert sampler.update(trained(), 2)


def test_the_same_weights_under_another_config(folder, tmp_path):
    other = trained()
    save(other, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Sampler(tmp_path) as sampler, pytest.raises(WeightMismatch, match="computes something else; give the sampler"):
        sampler.update(other, 1)
    with Sampler(tmp_path, check_weights=False) as sampler:
        assert sampler.update(other, 1)


def test_weights_that_do_not_arrive_are_noticed(folder, monkeypatch):
    """After the two updates that are probed as well."""
    module, fill, lost = trained(), Gatherer.fill, "model.norm.weight"
    with Sampler(folder) as sampler:
        for step in range(4):
            with torch.no_grad():
                module.model.norm.weight.mul_(1.01)
            if step < 3:
                sampler.update(module, step)
        monkeypatch.setattr(Gatherer, "fill", lambda self, w: fill(self, [(n, t) for n, t in w if n != lost]))
        with pytest.raises(WeightMismatch, match=r"after step 3 the sampler does not hold the trainer's model\.norm"):
            sampler.update(module, 3)
        with pytest.raises(UserError, match="call update"):
            sampler.generate(["hello"])


# Two ranks. What runs there is a function of this module, called with the rank's world.


def sharded(how: str) -> Any:
    """The loop's model in one of the ways in which ranks hold one."""
    module = trained()
    if how == "ddp":
        return DistributedDataParallel(module)
    options: dict[str, Any] = {}
    if how == "hybrid":
        options["mesh"] = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    if how == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in module.model.layers:
        fully_shard(layer, **options)
    fully_shard(module, **options)
    return module


def whole(module: Any) -> dict[str, torch.Tensor]:
    named = module.module if isinstance(module, DistributedDataParallel) else module
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named.named_parameters()}


def a_loop(world: World, folder: str, how: str) -> Any:
    """Two optimizer steps with a sampling after each; what this rank got, and what was wrong."""
    module = sharded(how).train() if world.size > 1 else trained().train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    results = []
    with Sampler(folder, seed=3) as sampler:
        for step in (1, 2):
            tokens = torch.arange(2, 26).view(2, 12)
            module(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                # Leaves FSDP's root gathered, as a validation does.
                module(input_ids=tokens)
            skipped = sampler.update(module, step), sampler.update(module, step)
            wanted = whole(module)
            wrong = [name for name, tensor in held(sampler).items() if not torch.equal(tensor, wanted[name])]
            groups = sampler.completions(PROMPTS, SAMPLING, n=2)
            results.append((skipped, wrong, [[c.token_ids for c in group] for group in groups]))
        return results, all(m.training for m in module.modules())


@pytest.mark.parametrize("how", ["fully_shard", "hybrid", "ddp", "bfloat16"])
def test_two_ranks_sample_as_one_does(folder, how):
    first, second = run_ranks(a_loop, 2, folder, how)
    assert first == second
    results, training = first
    assert training
    for skipped, wrong, _ in results:
        assert skipped == (True, False)
        assert wrong == []
    assert results[0][2] != results[1][2]
    if how != "bfloat16":
        (alone,) = run_ranks(a_loop, 1, folder, how)
        assert [tokens for _, _, tokens in alone[0]] == [tokens for _, _, tokens in results]


def fewer_prompts_than_ranks(world: World, folder: str, path: str) -> Any:
    with Sampler(folder) as sampler:
        sampler.update(sharded("fully_shard"), 1)
        sampler.log(["hello"], 50, path=path, max_new_tokens=4)
        return sampler.generate(["hello"], temperature=0, max_new_tokens=20), sampler.generate([])


def test_one_prompt_on_two_ranks_is_sampled_and_logged_once(folder, tmp_path):
    first, second = run_ranks(fewer_prompts_than_ranks, 2, folder, str(tmp_path / "samples.jsonl"))
    wanted = make_tokenizer().decode(greedy(trained(), "hello", 20), skip_special_tokens=True)
    assert first == second == ([wanted], [])
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1


def rank_mistakes(world: World, folder: str) -> list[str]:
    """What this rank is told where rank 1 does something else, and that the sampler still works afterwards."""
    other = world.rank == 1
    said = []
    with Sampler(folder) as sampler:
        sampler.update(trained(), 1)
        for mistake in (
            lambda: sampler.generate(["other" if other else "hello"]),
            lambda: sampler.generate(["hello"], temperature=0.5 if other else 0.7),
            lambda: sampler.generate(["hello", [200] if other else [5]]),
            lambda: sampler.update(trained(), 3 if other else 2),
            lambda: sampler.update(make_module("qwen2") if other else trained(), 2),
        ):
            try:
                mistake()
            except UserError as error:
                said.append(str(error))
        assert sampler.update(trained(), 2)
        assert len(sampler.generate(["hello"])) == 1
    return said


def test_one_ranks_mistake_is_told_to_all(folder):
    first, second = run_ranks(rank_mistakes, 2, folder)
    assert first == second
    assert [message.split(";")[0].split(",")[0] for message in first] == [
        "generate: rank 1 has other prompts or settings than rank 0",
        "generate: rank 1 has other prompts or settings than rank 0",
        "rank 1: request 1: token id 200 at position 0 is outside the model's vocabulary of 64",
        "update: the ranks are at different steps: [2",
        "rank 1: update: the model has model.layers.0.self_attn.q_proj.bias",
    ]


def start_badly(world: World, folder: str) -> str:
    with pytest.raises(UserError) as caught:
        Sampler(folder, max_slots=1 if world.rank == 0 else 0)
    return str(caught.value)


def test_a_rank_that_cannot_start_stops_all(folder):
    first, second = run_ranks(start_badly, 2, folder)
    assert first == second
    assert first.startswith("rank 1: max_slots is 0")
