"""A Hugging Face folder of a run's newest weights, of one of its checkpoints, or of a model in another dtype."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import GenerationConfig

from tandem.assembly.configs.uses import ExportConfig
from tandem.checkpoint.store import Checkpoint, CheckpointStore, open_checkpoint
from tandem.errors import RunFailure, UserError, first_line
from tandem.models.folder import located, readable_errors
from tandem.models.forward import LoadedModel
from tandem.models.loading import load_tokenizer
from tandem.models.lora.adapters import Adapters, merge_folder, put_saved
from tandem.models.lora.folder import adapter_folder, base_of
from tandem.models.policy import Merged
from tandem.models.proof.limits import model_config
from tandem.models.quantized.layers import dequantize_module
from tandem.models.scalar import auto_class, forget_scale, scalar_keys
from tandem.models.seeing import SeeingModel
from tandem.models.text_config import config_in
from tandem.models.trusted import is_trusted, source_of
from tandem.models.weights import load_whole
from tandem.runs.folder import CHECKPOINTS, MODEL, RunFolder, require_apart, require_writable
from tandem.runs.identity import CONFIG, IDENTITY, read_run
from tandem.runs.progress import say
from tandem.types import ScoreScale
from tandem.whole import whole_folder


def export(config: ExportConfig) -> Path:
    """Writes ``--out``, whole or not at all, and pushes it if asked. Returns the folder.

    Raises UserError for a checkpoint that is damaged, half there or not of the base model, for a folder that is neither
    a run, a checkpoint nor a model, and for what the hub refuses.
    """
    section, out = config.export, Path(config.export.out)
    if out.exists() and not section.overwrite:
        raise UserError(f"{out}: is there already; give another --out, or replace it with --overwrite")
    require_apart(out, {"model": [located(section.model)]})
    _require_replaceable(out, Path(located(section.model)))
    require_writable(out.absolute().parent)
    found = find_weights(section.model, section.step, section.role)
    if section.ema and not isinstance(found, Checkpoint):
        raise UserError(f"ema: {found} is no checkpoint; of a finished run the running average is the folder model-ema")
    if isinstance(found, Checkpoint):
        model, state = _of_checkpoint(found, config)
    else:
        model, state = _of_folder(source_of(found, section.trust_remote_code), config)
    hub = Hub(section.push_to_hub, private=section.private) if section.push_to_hub is not None else None
    try:
        with whole_folder(out) as aside:
            say(f"writing {out}")
            model.export(aside, {name: _in_dtype(name, t, model.torch_dtype) for name, t in state.items()})
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    if hub is not None:
        hub.upload(out)
    return out


def _require_replaceable(out: Path, source: Path) -> None:
    """Raises UserError where ``--overwrite`` would remove what is no exported model, or what is to be exported."""
    if not out.exists():
        return
    if out.is_symlink() or not out.is_dir():
        raise UserError(f"{out}: is no folder, and would be lost; give another --out")
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds {source}, which is exported, and would be lost; give another --out")
    present = [*out.iterdir()]
    other = next((path for path in present if path.is_dir() or path.name == IDENTITY), None)
    if other is not None or (present and not (out / "config.json").exists()):
        raise UserError(
            f"{out}: holds {(other or present[0]).name!r}, and --overwrite replaces the folder of a model only; give "
            "another --out"
        )


def _in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises UserError where a number of it is too large for the dtype."""
    if not tensor.is_floating_point():
        return tensor
    found = tensor.to(dtype)
    if found.dtype != tensor.dtype and not (found.isfinite() == tensor.isfinite()).all():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise UserError(f"dtype: {name} has {largest:.6g}, which {str(dtype).removeprefix('torch.')} cannot hold")
    return found


def find_weights(place: str, step: int | None, role: str = "actor") -> Checkpoint | str:
    """The checkpoint, or the folder or hub name of a model, that a place means.

    Of a run's folder the checkpoint of ``step``, or without one the finished model, or else the newest checkpoint: a
    run that was resumed for more steps has not finished before those are done, whatever model it wrote before. Of a
    ``role`` beside the policy there are checkpoints only.
    """
    path = Path(located(place))
    if path.name.endswith(".pt"):
        path = path.parent
    if path.parent.name == CHECKPOINTS or (path / "manifest.json").exists():
        if step is not None:
            raise UserError(f"step: {path} is one checkpoint already; leave the key out, or give its run's folder")
        return _checkpoint(path)
    if not (path / IDENTITY).exists():
        if step is not None:
            raise UserError(f"step: {place} is not the folder of a run, which alone has checkpoints")
        if role != "actor":
            raise UserError(f"role: {place} is one model, and no run or checkpoint with several; leave the key out")
        return place
    if step is not None:
        found = path / CHECKPOINTS / f"step_{step:08d}"
        if not found.is_dir():
            names = [p.name for p in sorted((path / CHECKPOINTS).glob("step_*"))]
            raise UserError(f"{found}: no such checkpoint; those of the run: {', '.join(names) or 'none'}")
        return _checkpoint(found)
    model = path / MODEL if role == "actor" and (path / MODEL / "config.json").exists() else None
    if model is not None and RunFolder.finished(path) is not None:
        return str(model)
    newest = CheckpointStore(path / CHECKPOINTS, keep=0, run=read_run(path)).latest()
    if model is not None:
        if newest is None:
            return str(model)
        say(f"{path}: the run has gone on since it wrote {model}; its newest checkpoint is taken")
    if newest is None:
        raise UserError(f"{path}: a run that has saved no checkpoint and written no model yet")
    return newest


def _checkpoint(path: Path) -> Checkpoint:
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    run = path.parent.parent
    return open_checkpoint(path, read_run(run) if (run / IDENTITY).exists() else {})


def _of_checkpoint(checkpoint: Checkpoint, config: ExportConfig) -> tuple[LoadedModel, dict[str, Tensor]]:
    """The weights of a trained model in a checkpoint, and an empty one of the base's class to write them with."""
    say(f"reading {checkpoint.path}")
    role = config.export.role
    saved = checkpoint.load(role)
    adapters = saved.get("adapters")
    named = config.export.base or (adapters["base"] if adapters else _base_of(checkpoint.path.parent.parent, role))
    base = source_of(named, config.export.trust_remote_code)
    state: dict[str, Tensor] = saved["model"]
    if config.export.ema:
        if not saved["ema"]:
            raise UserError(f"ema: the run of {checkpoint.path} keeps no running average; it would with --ema-decay")
        state |= saved["ema"]
    scalar = any(name.startswith("score.") for name in state)
    if adapters is not None:
        module = _base_module(base, scalar=scalar)
        try:
            put = put_saved(module, adapters, base, state)
        except UserError as error:
            raise UserError(f"{checkpoint.path}: {error} as --base") from None
        if not config.export.merge:
            return _written_in(module, load_tokenizer(base), base, config, put), state
        dequantize_module(module)
        buffers = dict(module.named_buffers())
        state = {**Merged(module, dict(module.named_parameters()))} | {
            name: tensor for name, tensor in module.state_dict().items() if name in buffers
        }
    tokenizer = load_tokenizer(base)
    auto = auto_class(model_config(base), base, scalar=scalar)
    with readable_errors(base, "model"), torch.device("meta"):
        about = config_in(located(base))
        vars(about).pop("quantization_config", None)  # what is written is whole
        if scalar:
            for key, value in scalar_keys(about, tokenizer).items():
                setattr(about, key, value)
            forget_scale(about)  # that of the base's scores
        module = auto.from_config(about, trust_remote_code=is_trusted(base)).eval()
    with suppress(OSError):  # a base that has none
        if not scalar:
            module.generation_config = GenerationConfig.from_pretrained(located(base))
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if differing := sorted(name for name in wanted if given.get(name) != wanted[name]):
        raise UserError(
            f"{checkpoint.path}: not a checkpoint of {base}: {differing[0]} is {given.get(differing[0], 'not there')} "
            f"in it and {wanted[differing[0]]} there; give the model that its run began with as --base"
        )
    return _written_in(module, tokenizer, base, config), state


def _of_folder(source: str, config: ExportConfig) -> tuple[LoadedModel, dict[str, Tensor]]:
    """A whole model, in a folder or on the hub."""
    folder = adapter_folder(source)
    if config.export.base is not None:
        kind = "a whole model, which needs none" if folder is None else "a folder of adapters, which names its own"
        raise UserError(f"base: {source} is {kind}; leave the key out")
    if folder is not None and not config.export.merge:
        raise UserError(f"merge: {source} is a folder of adapters already; copy it")
    about = model_config(source)
    scalar = any(name.endswith("ForSequenceClassification") for name in about.architectures or ())
    if folder is not None:
        module = _base_module(base_of(source), scalar=scalar or folder.scalar)
        module = merge_folder(module, source)
        for name in ScoreScale._fields:
            if hasattr(about, name):
                setattr(module.config, name, getattr(about, name))
    else:
        module, _ = load_whole(auto_class(about, source, scalar=scalar), source, what="model")
        dequantize_module(module)
    state = module.state_dict()
    return _written_in(module, load_tokenizer(source), base_of(source), config), state


def _base_module(base: str, *, scalar: bool) -> Any:
    """The model that adapters are of, in float32 on the CPU, with the head that theirs has."""
    about = model_config(base)
    changes = scalar_keys(about, load_tokenizer(base)) if scalar else None
    auto = auto_class(about, base, scalar=scalar)
    module, _ = load_whole(auto, base, what="model", new="score" if scalar else "", config_changes=changes)
    return module.eval()


def _written_in(
    module: Any, tokenizer: Any, base: str, config: ExportConfig, adapters: Adapters | None = None
) -> LoadedModel:
    """The module in the dtype that is asked for, so that its config says so; the text half of ``base`` if that sees."""
    sees = not hasattr(module, "score")
    seeing = SeeingModel.of(located(base)) if sees else None
    module = module.to(getattr(torch, config.export.dtype))
    model = LoadedModel(module=module, tokenizer=tokenizer, seeing=seeing, adapters=adapters)
    model.dtype = config.export.dtype  # type: ignore[assignment]
    return model


def _base_of(run: Path, role: str) -> str:
    """What a model of the run that a checkpoint is of began with, as its config says."""
    try:
        given = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        keys = ("model",) if role == "actor" else (role, "reward_model", "model")
        base = next(given[key] for key in keys if given.get(key))
        base = base if isinstance(base, str) else base[0]
    except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration) as error:
        raise UserError(
            f"{run / CONFIG}: does not say which model the run began with ({first_line(error)}); give it as --base"
        ) from None
    return str(base)


class Hub:
    """A repository on the Hugging Face hub."""

    def __init__(self, name: str, *, private: bool) -> None:
        """Makes it, unless it is there: a wrong name or token shows before anything is written. Raises UserError."""
        from huggingface_hub import HfApi

        self.name, self.api = name, HfApi()
        self._call("cannot be made", lambda: self.api.create_repo(name, private=private, exist_ok=True))

    def upload(self, folder: Path) -> None:
        """One commit with all files. Raises RunFailure where that fails; the folder stays."""
        say(f"pushing to {self.api.endpoint}/{self.name}")
        self._call(
            f"cannot be pushed to; {folder} is written, and 'hf upload {self.name} {folder}' pushes it again",
            lambda: self.api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=f"Exported by Tandem from {folder.name}"
            ),
        )

    def _call(self, what: str, call: Any) -> None:
        from httpx2 import HTTPError
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            call()
        except HFValidationError as error:
            raise UserError(f"push_to_hub: {first_line(error)}") from None
        except HfHubHTTPError as error:
            code = error.response.status_code
            hint = "; log in with 'hf auth login', or set HF_TOKEN" if code in (401, 403) else ""
            kind = UserError if code < 500 else RunFailure
            raise kind(f"push_to_hub: {self.name} {what}: {code} from {self.api.endpoint}{hint}") from None
        except (HTTPError, OSError) as error:
            raise RunFailure(f"push_to_hub: {self.name} {what}: {first_line(error)} ({self.api.endpoint})") from None
