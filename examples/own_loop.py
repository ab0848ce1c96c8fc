"""A fine-tuning loop of your own, in plain PyTorch and FSDP2, with a Tandem sampler in it (the lines marked  # tandem).

    python examples/own_loop.py                                     one process
    torchrun --nproc-per-node 2 examples/own_loop.py                two, the model sharded over them
    tandem launch --workers 2 examples/own_loop.py --engine vllm    the same, sampled with vLLM

It teaches a small Llama to sort letters, offline and on a CPU in well under a minute.
"""

import argparse
import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import tandem
from tandem.own_loop.sampler import Sampler  # tandem
from tandem.tasks.letters import answer, prompts
from tandem.tasks.tiny import build_model, build_tokenizer


def make_folder(folder: Path) -> None:
    """What you would download: a model and a tokenizer as a Hugging Face folder. Rank 0 makes it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        build_model(seed=0).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()


def batch_of(tokenizer, rng: random.Random, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts with their right answers, padded; only answers are trained."""
    asked = prompts(rows, rng.getrandbits(32))
    texts = [prompt + answer(prompt) + tokenizer.eos_token for prompt in asked]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate(asked):
        labels[row, : len(prompt)] = -100
    return {"input_ids": batch["input_ids"].to(device), "labels": labels.to(device)} | {
        "attention_mask": batch["attention_mask"].to(device)
    }


def train(options: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> None:
    """The loop."""
    make_folder(options.out / "base")
    tokenizer = AutoTokenizer.from_pretrained(options.out / "base")
    model = AutoModelForCausalLM.from_pretrained(options.out / "base", dtype=torch.float32).to(device).train()
    if ranks > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = random.Random(rank)
    held_out = prompts(8, seed=1, split="heldout")

    with Sampler(options.out / "base", engine=options.engine) as sampler:  # tandem
        for step in range(1, options.steps + 1):
            loss = model(**batch_of(tokenizer, rng, 64 // ranks, device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            if step % options.every == 0:
                sampler.update(model, step)  # tandem
                texts = sampler.generate(held_out, max_new_tokens=10, temperature=0)  # tandem
                sampler.log(held_out, step, path=options.out / "samples.jsonl", every=options.every)  # tandem
                right = sum(text == answer(prompt) for prompt, text in zip(held_out, texts, strict=True))
                if rank == 0:
                    print(f"step {step}: loss {loss.item():.3f}, {right} of 8 right; {held_out[0]} {texts[0]}")


def main() -> None:
    """Meets the other processes, where torchrun started several, and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["live", "vllm"], default="live")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=15, help="steps between two samplings")
    parser.add_argument("--out", type=Path, default=Path("runs/own_loop"))
    options = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group()
    try:
        train(options, rank, ranks, device)
    except tandem.UserError as error:
        raise SystemExit(f"own_loop: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
