"""What one GPU gains where it decodes while it trains, each on a stream of its own: too little to be built.

    python bench/beside.py --json bench/results/beside_0.5b.json

Method. A model of Qwen2.5's shape trains on 512 packed sequences, prompts of 64 tokens with completions of 100 to 419,
compiled; the live engine decodes 256 samples with the same module. Each alone first, then both: the engine steps in a
thread of its own, on a stream of a higher priority than training's or of the same. "together" is the share of its rate
alone that each reaches, added up: 1 is what taking turns gives.
"""

from __future__ import annotations

import argparse
import threading
import time
from functools import partial

import torch
from common import Record, arguments, measure, print_table, resolve_device, seconds_of
from models import SIZES, byte_tokenizer, random_model

from tandem.batch import Batch, TokenLoss
from tandem.data.packing import pack, stamp_weights
from tandem.engines.live.engine import LiveEngine
from tandem.models.loading import prepare_module
from tandem.training.optim import OptimParams
from tandem.training.trainer import LocalTrainer
from tandem.types import Request, SamplingParams, Sequence

PRIORITIES = {"same": 0, "higher": -1}
ROWS, PROMPT, STEPS = 256, 64, 2


def batch_of(vocabulary: int) -> Batch:
    """64 prompts with 8 completions each."""
    draw = partial(torch.randint, 2, vocabulary, generator=torch.Generator().manual_seed(0))
    rows = []
    for _ in range(64):
        prompt = draw((PROMPT,)).tolist()
        for length in torch.randint(100, 420, (8,)).tolist():
            own = draw((length,)).tolist()
            rows.append(Sequence(token_ids=prompt + own, trainable=[False] * PROMPT + [True] * length))
    return stamp_weights(pack(rows), "token")


def run(options: argparse.Namespace, record: Record) -> None:
    """Adds a row for each alone, and for both at once."""
    module = random_model(options.size, options.device, eos=None)
    vocabulary = module.config.vocab_size
    tokenizer = byte_tokenizer(vocabulary, eos=False)
    model = prepare_module(module, tokenizer, dtype="bfloat16", device=options.device)
    optim = OptimParams(learning_rate=1e-6, total_steps=1)
    trainer = LocalTrainer(
        model, lambda out, batch: TokenLoss(loss_T=-out.logp_T), optim, token_budget=16384, compile="auto"
    )
    engine = LiveEngine(module, tokenizer, max_slots=ROWS, max_length=2048)
    batch = batch_of(vocabulary)

    def train() -> None:
        for _ in range(STEPS):
            trainer.forward_backward(batch)

    def ask(new_tokens: int) -> None:
        sampling = SamplingParams(max_new_tokens=new_tokens)
        engine.submit([Request(prompt_ids=(2 + i,) * PROMPT, seeds=(i,), sampling=sampling) for i in range(ROWS)])

    def decode(stream: torch.cuda.Stream, from_tokens: int, begun: threading.Event, stop: threading.Event) -> None:
        def until() -> bool:
            if engine.sampled_tokens >= from_tokens:
                begun.set()
            return stop.is_set()

        with torch.cuda.stream(stream):
            engine.wait(until)

    def decoding(seconds: float) -> float:
        """Tokens per second, alone."""
        ask(1900)
        engine.wait(lambda: engine.sampled_tokens > 0)
        drawn, start = engine.sampled_tokens, time.perf_counter()
        engine.wait(lambda: time.perf_counter() > start + seconds)
        rate = (engine.sampled_tokens - drawn) / (time.perf_counter() - start)
        engine.cancel()
        return rate

    train()
    decoding(1)
    alone = min(seconds_of(train, options.device) for _ in range(options.repeats)) / STEPS
    rate = max(decoding(1.5) for _ in range(options.repeats))
    record.add({"system": "alone", "step_seconds": alone, "tokens_per_second": rate, "together": 1.0})
    for name, priority in PRIORITIES.items():
        for _ in range(options.repeats):
            ask(1900)
            begun, stop = threading.Event(), threading.Event()
            stream, from_tokens = torch.cuda.Stream(priority=priority), engine.sampled_tokens + 64 * ROWS
            thread = threading.Thread(target=decode, args=(stream, from_tokens, begun, stop))
            thread.start()
            begun.wait()
            drawn, start = engine.sampled_tokens, time.perf_counter()
            train()
            # Not of the device, which the other thread keeps busy.
            torch.cuda.current_stream().synchronize()
            seconds = time.perf_counter() - start
            both = (engine.sampled_tokens - drawn) / seconds
            stop.set()
            thread.join()
            engine.cancel()
            step = seconds / STEPS
            record.add({
                "system": f"both, priority {name}", "step_seconds": step, "tokens_per_second": both,
                "together": alone / step + both / rate,
            })  # fmt: skip


def main() -> None:
    """Runs it and prints the table."""
    parser = arguments(__doc__, ["beside"], SIZES, "0.5b")
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    record = Record(options)
    measure(options, record, {"beside": run})
    columns = {"system": "", "step_seconds": "training step s", "tokens_per_second": "decoding tok/s",
               "together": "together"}  # fmt: skip
    print_table(f"Decoding beside training, {options.size}", columns, record.rows)


if __name__ == "__main__":
    main()
