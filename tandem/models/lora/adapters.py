"""LoRA adapters on the layers of a transformers model, through peft: put on, read, written, merged.

The module stays the unmodified transformers class with the names of its other parts; only layers with adapters are
replaced by peft's, each with its frozen ``base_layer``. Modules stay in eval mode: dropout of adapters would make the
trainer and the sampler disagree, so there is none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.errors import UserError, first_line
from tandem.kernels import bits
from tandem.lazy import extra
from tandem.models.folder import located
from tandem.models.lora.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, QUANTIZED, adapter_folder, base_of
from tandem.models.lora.linear import speed_up_pairs
from tandem.models.lora.pairs import NAME, adapted, last_name, pairs_of
from tandem.models.lora.targets import ALL_LINEAR, HEADS, TIED, is_tied, require_own_weights, targets_of
from tandem.models.moe.experts import is_grouped, is_stack, speed_up_stacks
from tandem.models.quantized.layers import dequantize_module, quantized_in
from tandem.models.seeing import PartNames, SeeingModel
from tandem.seeds import derive_seed

PREFIX = "base_model.model."
"""Before every name in peft's files."""
TAKES_PART = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways of peft to begin (``init_lora_weights``) that take a part out of the base as adapters are put on it: the first
three take out the same again whenever a folder is read."""
BASE_SUM, BODY_SUM = "base_sum", "body_sum"
"""What a file of adapters says of their base (``Adapters``), beside their tensors."""
log = logging.getLogger("tandem")


@dataclass(frozen=True, kw_only=True)
class AdapterParams:
    """Adapters that are to be put on a model: ``y = W x + s B A x``, W frozen, B at 0 (arXiv:2106.09685, equation 3).

    The scale s is ``alpha / rank``, with ``rslora`` ``alpha / sqrt(rank)`` (arXiv:2312.03732). ``dora`` trains each
    row's length apart from its direction (arXiv:2402.09353, equation 5).
    """

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Last parts of the names of linear layers, of the embedding or of the head, or ``experts``: those that are
    stacked, or some of these (``experts.down_proj``). ``all-linear``: all linear layers but the head."""
    beside: bool = False
    """Whether the model is one beside the policy, which may lack a target that the policy has: its head."""
    dora: bool = False
    rslora: bool = False
    folder: str | None = None
    """A folder of adapters to begin with, whose config counts instead of all above."""
    quantize: Literal["none", "nf4", "fp8"] = "none"
    """How the linear layers of the base are kept (QLoRA, arXiv:2305.14314)."""
    seed: int = 0
    """The numbers that A starts with are drawn from it."""


@dataclass(kw_only=True)
class Adapters:
    """The adapters on a module: its trained parameters are theirs, and those of a scalar head."""

    module: Any
    config: Any
    """peft's."""
    base: str
    """Folder or hub name of the model that they are on."""
    base_sum: str
    """What its frozen parameters are known by (``sums_of``)."""
    body_sum: str
    """What they are known by without its head."""
    fresh: bool
    """Whether they change nothing yet."""
    quantized: str
    """How the linear layers of the base are kept: ``none``, ``nf4``, ``fp4``, ``fp8``."""

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that are trained."""
        return [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    @contextmanager
    def off(self) -> Iterator[None]:
        """With the base alone."""
        layers = adapted(self.module)
        for layer in layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers.values():
                layer._disable_adapters = False

    @property
    def saved(self) -> dict[str, str]:
        """What a checkpoint says of them: ``config`` as JSON, ``base`` and ``base_sum``, and ``quantized``."""
        return {
            "config": json.dumps(_as_json(self.config)),
            "base": self.base,
            "base_sum": self.base_sum,
            "quantized": self.quantized,
        }

    def require_base(self, saved: Mapping[str, str]) -> None:
        """Raises UserError where saved adapters (``saved``) are of another base than this one."""
        if saved["base_sum"] != self.base_sum:
            raise UserError(
                f"the checkpoint's adapters were trained on another base ({saved['base']}, weights "
                f"{saved['base_sum']}) than {self.base} (weights {self.base_sum}); give the model that the run began "
                "with"
            )

    def require_quantized(self, saved: Mapping[str, str]) -> None:
        """Raises UserError where saved adapters were trained on a base that was kept in another way."""
        if (theirs := saved.get("quantized", "none")) != self.quantized:
            raise UserError(
                f"lora.quantize: the checkpoint's adapters were trained on a base that is kept as {theirs}, and this "
                f"one is kept as {self.quantized}; give the same"
            )

    def write(self, folder: Path, state: Mapping[str, Tensor], names: PartNames | None = None) -> None:
        """Writes what peft reads, and the base's config: ``state`` has what is trained, whole, by its names here.

        ``names``: those of a model that also sees, whose text half the base is. They are written as adapters of that.
        """
        from safetensors.torch import save

        named = {peft_name(name): state[name].detach().contiguous() for name in self.trained}
        config = _as_json(self.config)
        if names is not None:
            named = {PREFIX + names.in_whole(name.removeprefix(PREFIX)): tensor for name, tensor in named.items()}
            config["exclude_modules"] = names.elsewhere
        folder.mkdir(parents=True, exist_ok=True)
        sums = {BASE_SUM: self.base_sum, BODY_SUM: self.body_sum}  # which peft does not look at
        (folder / ADAPTER_WEIGHTS).write_bytes(_in_order(save(named, {"format": "pt"} | sums)))
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        self.module.config.architectures = [type(self.module).__name__]
        if self.quantized in ("nf4", "fp8"):
            setattr(self.module.config, QUANTIZED, self.quantized)
        self.module.config.save_pretrained(folder)


def put_adapters(module: Any, params: AdapterParams, base: str, base_sum: str | None = None) -> Adapters:
    """Puts adapters on the module, whose own parameters are frozen, but for a scalar head.

    ``base_sum``: what they are known by, where their numbers are no longer what was loaded.

    Raises UserError where peft is missing, where no layer has the name of a target, and for a folder of adapters that
    are not of this model.
    """
    peft = require_peft()
    if params.folder is None:
        layers, stacks = targets_of(module, params.targets, params.rank, beside=params.beside, dora=params.dora)
        config = peft.LoraConfig(
            r=params.rank,
            lora_alpha=params.alpha,
            target_modules=layers,
            target_parameters=stacks or None,
            fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
            use_dora=params.dora,
            use_rslora=params.rslora,
        )
    else:
        mapping = _mapping_of(base)
        config = _config_of(peft, params.folder, mapping)
    adapters = _put(peft, module, config, base, fresh=params.folder is None, base_sum=base_sum)
    if params.folder is None:
        _start(module, params.seed)
        if moved := {*(config.target_parameters or ())} - {*stacks}:
            log.warning(
                "%s: peft takes gate_proj, up_proj and down_proj of this kind of model for those of its experts: these "
                "have adapters (%s), and layers of such names elsewhere, dense or of shared experts, have none",
                type(module).__name__, " and ".join(sorted(moved)),
            )  # fmt: skip
    else:
        _fill(module, params.folder, mapping, beside=params.beside)
        _say_other_base(params.folder, config, lambda: (adapters.base_sum, adapters.body_sum))
    return adapters


def put_saved(module: Any, saved: Mapping[str, str], base: str, state: Mapping[str, Tensor]) -> Adapters:
    """Puts those of a checkpoint on the module: what they are (``Adapters.saved``), and their values by name.

    Raises UserError where they are of another base than the module.
    """
    peft = require_peft()
    config = peft.LoraConfig.from_peft_type(**json.loads(saved["config"]) | {"inference_mode": False})
    adapters = _put(peft, module, config, base, fresh=False)
    adapters.require_base(saved)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    return adapters


def _put(peft: Any, module: Any, config: Any, base: str, *, fresh: bool, base_sum: str | None = None) -> Adapters:
    scalar = _is_scalar(module)
    require_own_weights(module)
    # Its path may be read from another folder later.
    named = str(Path(base).expanduser().resolve()) if Path(base).expanduser().is_dir() else base
    whole_sum, body_sum = (base_sum, base_sum) if base_sum is not None else sums_of(module)
    layers = quantized_in(module)
    # Heads are trained in their places here, and not in copies of peft's.
    config.base_model_name_or_path, config.modules_to_save = named, None
    config.task_type = "SEQ_CLS" if scalar else "CAUSAL_LM"
    try:
        peft.inject_adapter_in_model(config, module, adapter_name=NAME)
    except ValueError as error:
        raise UserError(f"lora.targets: {first_line(error)}") from None
    _require_plain(module, base)
    speed_up_stacks(module)
    speed_up_pairs(module)
    for parameter in module.parameters():
        if parameter.requires_grad:
            # Of a base in bfloat16 peft makes them that, too.
            parameter.data = parameter.data.float()
    if scalar:
        config.modules_to_save = [*HEADS]
        for head in HEADS:
            getattr(module, head).requires_grad_(True)
    module.eval()
    quantized = next((layer.kind for layer in layers.values()), "none")
    return Adapters(
        module=module,
        config=config,
        base=named,
        base_sum=whole_sum,
        body_sum=body_sum,
        fresh=fresh,
        quantized=quantized,
    )


def _require_plain(module: Any, base: str) -> None:
    """Raises UserError, naming a layer, for adapters that compute other things than ``put_adapters`` says.

    What folds or fuses them, and what makes log-probs of the head, knows of no others.
    """
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    scalars = {id(getattr(module, head, None)) for head in HEADS}
    for name, layer in adapted(module).items():
        variant = getattr(layer, "lora_variant", {}).get(NAME)
        base_layer = layer.get_base_layer()
        if layer is embedding:
            known = variant is None and NAME in layer.lora_embedding_A
        elif is_stack(layer):
            known = layer.get_param().ndim == 3 and is_grouped(base_layer)
        else:
            known = isinstance(base_layer, nn.Linear | Conv1D) and id(layer) not in scalars and NAME in layer.lora_A
            dora = type(variant).__name__ == "DoraLinearVariant" and layer is not head
            dora = dora and not isinstance(base_layer, Conv1D)
            known = known and (variant is None or dora)
        if not known or (NAME in layer.lora_B and layer.lora_B[NAME].bias is not None):
            raise UserError(
                f"adapters on {base}: those of {name} are more than a pair of matrices on a linear layer, embedding, "
                "head or stacked experts (lora_bias, aLoRA, DoRA of a head, an embedding or a Conv1D), which Tandem "
                "does not train on; merge them into their base with peft, and put new ones on that"
            )
    _require_apart(module, base)


@torch.no_grad()
def idle_layers(module: Any) -> list[str]:
    """Last parts of the names of linear layers with adapters that no forward calls."""
    head = module.get_output_embeddings()
    called: dict[str, bool] = {}
    hooks = []
    for name, layer in adapted(module).items():
        if layer is head or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            continue
        kind = last_name(name)
        called.setdefault(kind, False)
        # One of them is enough: not every expert is picked.
        hooks.append(layer.register_forward_hook(lambda *_, kind=kind: called.update({kind: True})))
    try:
        if hooks:
            ids = torch.full((1, 2), 2, device=module.get_input_embeddings().weight.device)
            module.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [kind for kind, ran in called.items() if not ran]


def _require_apart(module: Any, where: str) -> None:
    """Raises UserError for adapters on an embedding that is the head, too."""
    ends = (module.get_input_embeddings(), module.get_output_embeddings())
    if is_tied(module) and any(layer is end for layer in adapted(module).values() for end in ends):
        raise UserError(f"adapters on {where}: {TIED}")


def _is_scalar(module: Any) -> bool:
    return any(hasattr(module, head) for head in HEADS)


def merge_folder(module: Any, folder: str) -> Any:
    """The module with the adapters of a folder added to its weights, none of them in few bits.

    Raises UserError where they are not its own.
    """
    from safetensors import SafetensorError

    peft = require_peft()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    try:
        config = peft.LoraConfig.from_pretrained(folder)
        _require_whole_base(config, folder, repeated=TAKES_PART[:3])
        _say_other_base(folder, config, lambda: sums_of(module))
        dequantize_module(module)
        if (mapping := _mapping_of(folder)) is not None:
            config.exclude_modules = None
        if _is_scalar(module) and config.task_type == "CAUSAL_LM":
            # A critic begins with a policy's, and peft asks what they are for for what a language model has.
            config.task_type = None
        with warnings.catch_warnings():
            # Those that the folder lacks would add nothing.
            warnings.filterwarnings("error", "Found missing adapter keys")
            put = peft.PeftModel.from_pretrained(module, folder, config=config, key_mapping=mapping)
            _require_apart(put.get_base_model(), folder)
            found = put.merge_and_unload(safe_merge=True)
    except SafetensorError as error:
        raise UserError(f"{Path(folder) / ADAPTER_WEIGHTS}: cannot be read: {first_line(error)}") from None
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, UserWarning) as error:
        raise UserError(f"{folder}: its adapters are not of its base: {first_line(error)}") from None
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(name in trained)  # peft has frozen them
    return found.eval()


def peft_name(name: str) -> str:
    """What a parameter is called in peft's files."""
    if name.endswith(f"lora_magnitude_vector.{NAME}.weight"):
        return PREFIX + name.removesuffix(f".{NAME}.weight")
    return PREFIX + name.removesuffix(f".{NAME}").replace(f".{NAME}.", ".")


@torch.no_grad()
def sums_of(module: Any) -> tuple[str, str]:
    """What a module's parameters are known by: their names, types, and every bit of them. Without a scalar head.

    And the same without the language-model head, where that is not the embedding. A layer that is ``Quantized`` counts
    with the weight that it was made of, so that the sum is that of the folder, wherever and however it was read; of
    weights that were in few bits in their folder with these.
    """
    layers = {f"{name}.weight": layer for name, layer in quantized_in(module).items() if layer.total is not None}
    scales = {f"{n}.{s}": getattr(x, s) for n, x in quantized_in(module).items() if x.total is None for s in x.names}
    parameters = {name: p for name, p in module.named_parameters() if name.partition(".")[0] not in HEADS} | scales
    head = module.get_output_embeddings()
    apart = set() if head is None or is_tied(module) else {id(p) for p in head.parameters()}
    totals: dict[str, int] = {name: layer.total for name, layer in layers.items() if layer.total is not None}
    for device in dict.fromkeys(p.device for p in parameters.values()):
        here = {name: p for name, p in parameters.items() if p.device == device and name not in totals}
        total_N = torch.zeros(len(here), dtype=torch.int32, device=device)
        jobs = [bits.Job(i, p.detach().reshape(1, -1), p.dtype, 0) for i, p in enumerate(here.values())]
        bits.prepare(jobs)(total_N)
        totals |= dict(zip(here, total_N.tolist(), strict=True))
    found = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for name, p in parameters.items():
        shape, dtype = (layers[name].shape, torch.float32) if name in layers else (tuple(p.shape), p.dtype)
        for sums in found[: 1 if id(p) in apart else 2]:
            sums.update(f"{name} {shape} {dtype} {totals[name]}\n".encode())
    return found[0].hexdigest(), found[1].hexdigest()


def require_peft() -> Any:
    """Raises UserError where peft is not installed."""
    return extra("peft", "lora: adapters are those", "lora")


@torch.no_grad()
def _start(module: nn.Module, seed: int) -> None:
    """A from U(-1, 1) / sqrt(inputs) as peft draws it, by numbers that depend on the seed and the layer's name alone.

    Of an embedding A is 0, and B from U(-1, 1) times the spread of the embedding's own numbers, as a power of 2, which
    no precision changes: peft's N(0, 1) would make its steps tens of times larger than a linear layer's beside it.
    """
    parameters = dict(module.named_parameters())
    for pair in pairs_of(module).values():
        layer = pair.a.rpartition(".lora_")[0]
        generator = torch.Generator().manual_seed(derive_seed(seed, "adapter", layer))
        first = parameters[pair.b if pair.embedding else pair.a]
        size = first.shape[1] ** -0.5
        if pair.embedding:
            size = 2.0 ** round(math.log2(parameters[pair.parameter].float().square().mean().sqrt().item() or 1.0))
            parameters[pair.a].zero_()
        first.copy_((torch.rand(first.shape, generator=generator) * 2 - 1) * size)


def _config_of(peft: Any, folder: str, mapping: Mapping[str, str] | None) -> Any:
    """peft's config of a folder of adapters that are to be trained on."""
    found = adapter_folder(folder)
    if found is None:
        raise UserError(f"lora.adapter: {folder}: no {ADAPTER_CONFIG} in it, so it is no folder of adapters")
    config = peft.LoraConfig.from_pretrained(found.folder)
    _require_whole_base(config, folder)
    if mapping is not None:
        config.exclude_modules = None
    others = [name for name in config.modules_to_save or () if name not in HEADS]
    refused = {
        "modules_to_save": others,
        "bias": config.bias != "none",
        "trainable_token_indices": config.trainable_token_indices,
    }
    if wrong := [name for name, there in refused.items() if there]:
        raise UserError(
            f"{folder}: its adapters train {', '.join(wrong)} besides pairs of matrices, which Tandem does not train "
            "on; merge them into their base with peft, and put new ones on that"
        )
    written = tuple(int(x) for x in re.findall(r"\d+", str(getattr(config, "peft_version", None) or "0"))[:3])
    if config.target_parameters and written < (0, 19, 1):
        raise UserError(
            f"{folder}: its adapters on {', '.join(sorted(config.target_parameters))} were written by peft before "
            "0.19.1, which had the two matrices of experts the other way round; merge them into their base with that"
        )
    if config.lora_dropout:
        log.warning(
            "%s: its dropout of %g is left out: sampler and trainer would disagree", folder, config.lora_dropout
        )
    config.inference_mode, config.lora_dropout = False, 0.0
    return config


def _require_whole_base(config: Any, folder: str, repeated: tuple[str, ...] = ()) -> None:
    """Raises UserError for adapters of a folder that are on another base than the one they name, as peft makes it of
    that: without a part that they began with, unless that way is ``repeated``, or with layers several times."""
    began = str(config.init_lora_weights).lower()
    if config.layer_replication:
        why = "are on a base that has some of its layers several times (layer_replication)"
    elif began.startswith(TAKES_PART) and began not in repeated:
        why = f"began with a part that peft took out of their base (init_lora_weights {config.init_lora_weights})"
    else:
        return
    raise UserError(
        f"{folder}: its adapters {why}, so that their base alone is not what they are beside; merge them into it with "
        "peft, in the process that made them, and put new ones on that"
    )


def _in_order(saved: bytes) -> bytes:
    """A safetensors file with its metadata in order: entries are written in any, and a run is to give equal bytes."""
    size = int.from_bytes(saved[:8], "little")
    header = json.loads(saved[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return saved[:8] + text.ljust(size) + saved[8 + size :]


def _say_other_base(folder: str, config: Any, sums_here: Callable[[], tuple[str, str]]) -> None:
    """Warns of adapters of a folder that were made beside another base than the one that has these ``sums_of``."""
    from safetensors import safe_open

    base, path = str(config.base_model_name_or_path), Path(folder).expanduser() / ADAPTER_WEIGHTS
    said: dict[str, str] = {}
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
    if {BASE_SUM, BODY_SUM} <= said.keys():
        theirs, sums = (said[BASE_SUM], said[BODY_SUM]), sums_here()
        # Where one of them has no language-model head, or its embedding is that, the rest counts.
        part = 1 if theirs[0] == theirs[1] or sums[0] == sums[1] else 0
        if theirs[part] != sums[part]:
            log.warning(
                "%s: its adapters were trained beside other weights (%s) than those of %s are (%s): together they are "
                "not what was trained; write the folder of their own base into %s as base_model_name_or_path",
                folder, theirs[part], base, sums[part], ADAPTER_CONFIG,
            )  # fmt: skip
    if config.revision not in (None, "main") and not Path(base).expanduser().is_dir():
        log.warning(
            "%s: its adapters are of %s at revision %s, and %s is read as it is now; download that revision, and write "
            "its folder into %s as base_model_name_or_path",
            folder, base, config.revision, base, ADAPTER_CONFIG,
        )  # fmt: skip


def _mapping_of(base: str) -> dict[str, str] | None:
    """What peft is told of the names in a folder of adapters, where their base is a model that also sees."""
    seeing = SeeingModel.of(located(base_of(base)))
    return None if seeing is None else PartNames.of(seeing.config).mapping


def _fill(module: Any, folder: str, mapping: Mapping[str, str] | None, *, beside: bool) -> None:
    """Reads the trained parameters from a folder; a head that it lacks stays as it is.

    ``mapping``: of names, as patterns. ``beside``: those of a head that the module lacks are left out.
    Raises UserError where they are others than the module's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder).expanduser() / ADAPTER_WEIGHTS
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    for pattern, half in (mapping or {}).items():
        found = {PREFIX + re.sub(pattern, half, name.removeprefix(PREFIX)): x for name, x in found.items()}
    if beside:
        found = {n: x for n, x in found.items() if hasattr(module, n.removeprefix(PREFIX).partition(".")[0])}
    for name, parameter in module.named_parameters():
        # peft writes an embedding that has adapters beside them.
        own = None if parameter.requires_grad else found.pop(PREFIX + name, None)
        if own is not None and not torch.equal(own.to(parameter), parameter):
            raise UserError(
                f"{path}: its {name} is another than the base's: it was trained, or given new words; merge the "
                "adapters into their base with peft, and put new ones on that"
            )
    wanted = {peft_name(name): p for name, p in module.named_parameters() if p.requires_grad}
    wanted = {name: p for name, p in wanted.items() if name in found or "lora_" in name}
    shapes = {name: tuple(p.shape) for name, p in wanted.items()}
    if differing := sorted(n for n in {*shapes, *found} if n not in found or shapes.get(n) != tuple(found[n].shape)):
        name = differing[0]
        there = tuple(found[name].shape) if name in found else "not there"
        raise UserError(
            f"{path}: not adapters of this model: {name} is {there} in it, and here {shapes.get(name, 'not there')}; "
            "give the base that they were trained on as --model"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def _as_json(config: Any) -> dict[str, Any]:
    """peft's config as its own files have it, ready to be loaded for use."""
    found = {**config.to_dict(), "inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}
