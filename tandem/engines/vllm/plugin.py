"""Runs inside vLLM's workers: Tandem's weight transport, and what an engine asks its workers for.

vLLM imports this file in every worker, as its entry point ``vllm.general_plugins`` and as ``worker_extension_cls``;
the second also finds it where Tandem is used from a source tree.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from tandem.engines.vllm.adapters import PushedAdapters, names_in, unwrapped
from tandem.engines.vllm.checksums import Shard
from tandem.engines.vllm.copies import Copies, may_copy
from tandem.engines.vllm.loading import (
    Bucket,
    Record,
    Sums,
    find_summed,
    load_and_record_copies,
    load_push,
    play_copies,
)
from tandem.engines.vllm.names import Names
from tandem.errors import UserError
from tandem.sync.links import Link
from tandem.sync.receiver import Receiver

BACKEND = "tandem"
log = logging.getLogger("tandem")


@dataclass
class Links(WeightTransferInitInfo):
    """One link a tensor-parallel rank."""

    links: Seq[Link]


@dataclass
class Push(WeightTransferUpdateInfo):
    """One push of all weights. All that it consists of is in the link's plan."""

    check: bool = False
    """Whether to sum what the model then holds."""


class TandemTransfer(WeightTransferEngine):
    """Takes a trainer's pushes from its link and loads them into this worker's model."""

    init_info_cls = Links
    update_info_cls = Push
    # vLLM asks for it before a draft model's update, which Tandem never sends.
    supports_draft_weight_update = False

    @cached_property
    def names(self) -> Names:
        """What the model's checkpoints call the tensors of a push."""
        # vLLM runs some classes of transformers as they are, and makes them ask for this config wherever they are made.
        with set_current_vllm_config(self.vllm_config):
            return Names(self.model_config.hf_config)

    receiver: Receiver | None = None
    record: Record | None = None
    sums: Sums | None = None
    """Of the record. Walking through all modules takes longer than all checksums, so it is done once."""
    may_copy: bool = False
    copies: Copies | None = None
    """How a push is loaded once it has been recorded: receive buffers and parameters stay where they are."""
    adapters: PushedAdapters | None = None
    """Where adapters travel beside the model, or alone once it has."""

    def init_transfer_engine(self, init_info: Links) -> None:
        self.shutdown()
        link = init_info.links[get_tensor_model_parallel_rank()]
        if self.vllm_config.lora_config is not None:
            self.adapters = PushedAdapters(self.model, self.names, link.plan, self.device)
        self.receiver = Receiver(link, self.device)

    def start_weight_update(self) -> None:
        """Nothing: a push is loaded in one go, so that a failure leaves no half of a reload behind."""

    def finish_weight_update(self) -> None:
        """Nothing, for the same reason."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        self._wait()

    def receive_weights(self, update_info: Push) -> None:
        """Takes one push. Raises UserError and names the tensor where it cannot be loaded."""
        if self.receiver is None:
            raise UserError("weight sync: the engine is not connected to a trainer; call connect() first")
        try:
            with set_current_vllm_config(self.vllm_config):
                self._take(self.receiver.buckets(), update_info.check)
        except BaseException:
            # The sender has buckets left over, which the next push must not begin with.
            self.shutdown()
            raise

    def load_adapters(self, check: bool) -> None:
        """Puts adapters that a push has brought where they are used, and begins to sum all that came."""
        if self.adapters is None:
            return
        new = not self.adapters.record
        self.adapters.load()
        if new:
            assert self.receiver is not None, "they came from it"
            link, summed = self.receiver.link, self.adapters.summed
            if self.record is not None:
                with unwrapped(self.model):
                    summed = find_summed(self.model) + summed
            record = (self.record or {}) | self.adapters.record
            self.sums = Sums(summed, record, link.plan, self.device, link.overlaps)
        if check:
            self.pushed().begin()
        self._wait()

    def _wait(self) -> None:
        if self.device.type != "cpu":
            # Sums go on, on a stream of their own.
            torch.accelerator.current_stream().synchronize()

    def _take(self, buckets: Iterator[Bucket], check: bool) -> None:
        """Loads the model, and keeps its adapters for ``load_adapters``, which begins the sums then."""
        if self.adapters is None:
            self._load(buckets, check)
        elif self.adapters.alone:
            for _ in self.adapters.apart(buckets):
                pass
        else:
            with unwrapped(self.model):
                self._load(self.adapters.apart(buckets), check=False)

    def _load(self, buckets: Iterator[Bucket], check: bool) -> None:
        """The first push learns what becomes of each tensor, the second which copies that takes; the rest play them."""
        if self.copies is not None:
            play_copies(self.copies, buckets, self.sums if check else None)
            return
        if self.record is None:
            record: Record = {}
            load_push(self.model, self.model_config, self.names, buckets, record)
            self.record = record
            assert self.receiver is not None, "buckets come from it"
            link = self.receiver.link
            self.sums = Sums(find_summed(self.model), record, link.plan, self.device, link.overlaps)
            self.may_copy = may_copy(self.model, all(target.exact for target in record.values()))
        elif self.may_copy:
            self.copies = load_and_record_copies(self.model, self.names, buckets, self.record)
            self.may_copy = self.copies is not None
        else:
            load_push(self.model, self.model_config, self.names, buckets, None)
        if check:
            self.pushed().begin()

    def pushed(self) -> Sums:
        """What sums this rank's parameters. Raises UserError before the first push."""
        if self.sums is None:
            raise UserError("checksums: nothing has been pushed yet, so vLLM's tensors have no origin to compare with")
        return self.sums

    def shutdown(self) -> None:
        if self.receiver is not None:
            self.receiver.close()
            self.receiver = None
        # Another trainer may send another plan.
        self.record = self.copies = self.sums = self.adapters = None
        self.may_copy = False

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM's own way to send (0.25 requires that a transport has it). Tandem sends with ``tandem.sync.source``."""
        raise TypeError("weights for the 'tandem' transport are sent by tandem.sync.source.WeightSource")


class WorkerExtension:
    """Methods that a worker gets, called through ``collective_rpc``: ``tandem_call``, and through it the others."""

    weight_transfer_engine: Any
    device: torch.device

    def tandem_call(self, method: str, *arguments: Any) -> tuple[Any, Exception | None]:
        """What the method returns, and what it raised.

        Returned, because vLLM reads no further answers once a rank has raised, and takes them for those to its next
        question.
        """
        try:
            return getattr(self, method)(*arguments), None
        except UserError as error:
            return None, error
        except Exception as error:
            # Others may not survive being sent to another process.
            log.debug("%s failed in a vLLM worker", method, exc_info=error)
            return None, RuntimeError(f"{type(error).__name__}: {error}")

    def tandem_require_adapters(self, layers: Seq[str]) -> None:
        """Raises UserError where vLLM takes no adapters on one of the trainer's layers."""
        names_in(self.weight_transfer_engine.model, self.weight_transfer_engine.names, layers)

    def tandem_connect(self, links: Seq[Link]) -> None:
        self.init_weight_transfer_engine({"links": links})  # type: ignore[attr-defined]

    def tandem_receive(self, check: bool) -> None:
        """Takes one push. Begins to sum what came, if asked to ``check``."""
        self.start_weight_update()  # type: ignore[attr-defined]
        self.update_weights({"check": check})  # type: ignore[attr-defined]
        self.finish_weight_update()  # type: ignore[attr-defined]
        self.weight_transfer_engine.load_adapters(check)

    def tandem_result(self) -> Seq[int | None]:
        """The checksums that the last push has begun, of each of ``tandem_shards``."""
        return self.weight_transfer_engine.pushed().result()

    def tandem_sums(self) -> Seq[int | None]:
        """Checksums of ``tandem_shards`` as they are now. Raises UserError before the first push."""
        self.weight_transfer_engine.pushed().begin()
        return self.tandem_result()

    def tandem_shards(self) -> Seq[Shard]:
        """Which parts of which tensors this rank holds, the same from the first push over a link to its last."""
        return self.weight_transfer_engine.pushed().shards

    def tandem_memory(self) -> tuple[float, float] | None:
        """Bytes free and in use on this worker's device, by whomever; None on a CPU."""
        if self.device.type == "cpu":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return float(free), float(total - free)

    def tandem_release(self) -> None:
        """Removes the names of the memory that ranks share on a CPU: vLLM leaves them, and it, in /dev/shm."""
        name = os.environ.get("VLLM_DIST_IDENT")
        if self.device.type == "cpu" and name:
            for file in Path("/dev/shm").glob(f"{glob.escape(name)}-*"):
                file.unlink(missing_ok=True)


def register() -> None:
    """Makes the transport known to vLLM in this process, once."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, TandemTransfer)
        if current_platform.is_cpu():
            turn_heads_apart()


def turn_heads_apart() -> None:
    """Has vLLM turn queries [T, H, D] by plain torch on a CPU, as latent attention gives them (DeepSeek, Kimi K2).

    Its kernel there takes [T, H D], and of others turns some heads by the positions of other tokens.
    """
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    own = RotaryEmbedding.forward_cpu

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        return self.forward_native(positions, query, key) if query.dim() > 2 else own(self, positions, query, key)

    RotaryEmbedding.forward_cpu = forward_cpu


# A worker that got here through worker_extension_cls has not been through the entry point.
register()
