"""The language model inside one that also sees or hears: loaded alone, and put back among the rest when it is saved.

Such a folder's config has a text model's inside (``text_config``). What is trained and sampled from is transformers'
causal class of that config, on the parts of the whole class that read text: these are loaded as parts of the whole, by
the names and conversions that transformers has for it, and nothing else of it is ever in memory.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from tandem.errors import UserError, first_line
from tandem.models.folder import located, quiet_transformers
from tandem.models.proof.shrunk import shrunken_config, trained_size
from tandem.models.text_config import PLAIN, half_of, sees

log = logging.getLogger("tandem")
FILES = (".json", ".jinja", ".txt", ".model", ".py")
"""Files of a folder, besides weights, that are written again: config, processor, tokenizer."""
STALE = re.compile(r"generation_config|adapter_config|trainer_state|best|.*\.index")
"""Names of .json files among them that say what is so of the folder itself, its weights or their training."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROVED_TO = 1e-4
"""The largest difference of two logits, of a size of about 1, on the small copy."""


@dataclass(frozen=True)
class SeeingModel:
    """A model that also sees, of which the text half alone is loaded."""

    source: str
    """Folder or hub name."""
    config: Any
    """The config of the whole."""

    @classmethod
    def of(cls, place: str | Path) -> SeeingModel | None:
        """What a folder or hub name holds; None where that is a language model alone, or brings its own code."""
        if "auto_map" in PreTrainedConfig.get_config_dict(place)[0]:
            return None
        config = AutoConfig.from_pretrained(place)
        return cls(str(place), config) if sees(config, place) else None

    def load(self, auto: Any, half: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The module of class ``auto`` with the config ``half``, and what transformers' loading says of its tensors.

        Raises UserError where the folder's weights are of a kind that could not be written again.
        """
        log.info(
            "%s: a %s: its text half is loaded alone (%s); its vision parts stay as they are, and are put back when it "
            "is saved", self.source, self.config.model_type, half.model_type,
        )  # fmt: skip
        self._files()
        config = copy.deepcopy(self.config)
        if type(half) is type(config.text_config):
            config.text_config = half
        whole, info = _reading(config).from_pretrained(self.source, config=config, **options)
        module = _half_in(whole, auto, half)
        if quantizer := getattr(whole, "hf_quantizer", None):
            module.hf_quantizer = quantizer
        names = PartNames(whole, module)
        ours = {key: {names.in_half(n) for n in info[key]} - {None} for key in ("missing_keys", "unexpected_keys")}
        mismatched = {(names.in_half(name), *shapes) for name, *shapes in info["mismatched_keys"]}
        info |= ours | {"mismatched_keys": {found for found in mismatched if found[0] is not None}}
        for name, parameter in module.named_parameters():
            if parameter.is_meta:  # a head that is not the whole's
                place, _, own = name.rpartition(".")
                empty = torch.zeros_like(parameter, device=whole.device, dtype=torch.float32)
                module.get_submodule(place)._parameters[own] = nn.Parameter(empty)
                info["missing_keys"].add(name)
        return module, info

    @torch.no_grad()
    def require_exact(self, device: torch.device) -> None:
        """Raises UserError where the text half alone says other than the whole does of text.

        Both are computed on a small copy, whose limits the tokens go beyond.
        """
        config = copy.deepcopy(self.config)
        half = shrunken_config(half_of(self.config, self.source))
        config.text_config = shrunken_config(config.text_config)
        vars(config).pop("quantization_config", None)
        try:
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # and no GPU's
                whole = _reading(config).from_pretrained(None, config=config, state_dict={}, dtype=torch.float32)
            trained_size(whole)
            module = _half_in(whole, AutoModelForCausalLM, half)
            special = {value for key, value in vars(config).items() if key.endswith(("_token_id", "_token_index"))}
            ids = torch.tensor([[n for n in range(2, half.vocab_size) if n not in special][:40]], device=device)
            found, wanted = (x.to(device).eval()(input_ids=ids, use_cache=False).logits for x in (module, whole))
            apart = float((found - wanted).abs().max()) / max(float(wanted.std()), 1e-3)
            why = "" if apart < PROVED_TO else f"its logits are {apart:.2g} apart from the whole's"
        except Exception as error:
            log.debug("no copy of %s", self.source, exc_info=error)
            why = f"{type(error).__name__}: {first_line(error)}"
        if why:
            raise UserError(
                f"{self.source}: a {self.config.model_type}, whose text half alone could not be shown to say what the "
                f"whole says of text ({why}); use a model of text alone"
            )

    def write(self, folder: Path, module: Any, state: Mapping[str, Tensor]) -> None:
        """Writes the whole: ``state`` (the half's weights, by its names) in place of its own, all else as it stands.

        The other tensors are read and written file by file. Where the original is gone the half is written by itself.
        Raises UserError where the folder is the original's own.
        """
        try:
            source, files = self._files()
        except (OSError, ValueError, UserError) as error:
            log.warning(
                "%s: the text half is written alone, without the other parts of %s, which cannot be read any more (%s)",
                folder, self.source, first_line(error),
            )  # fmt: skip
            module.save_pretrained(folder, state_dict=dict(state))
            return
        if folder.exists() and folder.samefile(source):
            raise UserError(
                f"{folder}: its vision parts are read while the model is written, and would be lost; give another"
            )
        names = PartNames.of(self.config)
        # A head of its own is the head, though the config says that there is none.
        whole, tied = names.whole, set(module.all_tied_weights_keys) - {n for n, _ in module.named_parameters()}
        whole.config.dtype = dtype = next(t.dtype for t in state.values() if t.is_floating_point())
        whole.generation_config = module.generation_config
        whole._weight_conversions = _turning_back(whole)
        whole.save_pretrained(folder, state_dict={names.in_whole(n): t for n, t in state.items() if n not in tied})
        for path in source.iterdir():
            stale = path.suffix == ".json" and STALE.fullmatch(path.stem)
            if path.suffix in FILES and path.is_file() and not stale:
                shutil.copyfile(path, folder / path.name)
        written = _put_beside(folder, (source / name for name in files), names)
        few_bits = any(".quant_state." in name for name in written)
        _say_what_is_written(
            folder / "config.json", str(dtype).removeprefix("torch."), names.text if few_bits else None
        )

    def _files(self) -> tuple[Path, list[str]]:
        """The folder, in the hub's cache where it is a hub's, and the names of its files of weights.

        Raises UserError where they are not safetensors, OSError or ValueError where one of them or the folder is gone.
        """
        folder = Path(located(self.source))
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            patterns = [*(f"*{suffix}" for suffix in FILES), "model*.safetensors"]
            folder = Path(snapshot_download(self.source, allow_patterns=patterns))
        if (folder / WEIGHTS).is_file():  # before an index, as transformers has it
            return folder, [WEIGHTS]
        if not (folder / INDEX).is_file():
            raise UserError(f"{self.source}: a {self.config.model_type} without {WEIGHTS}, whole or in parts; give one")
        files = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        if gone := [name for name in files if not (folder / name).is_file()]:
            raise FileNotFoundError(f"no {gone[0]} in {folder}")
        return folder, files


def _reading(config: Any) -> Any:
    """The whole's class, of which an instance has the parts that read text, and no others."""
    named = [n for n in config.architectures or () if n.endswith("ForConditionalGeneration")]
    kind = getattr(transformers, named[0], None) if named else None
    kind = kind or AutoModelForImageTextToText._model_mapping[type(config)]

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        _strip(self, [_text_model(self), self.get_output_embeddings()])

    # Conversions of names are found by the class's own name and module.
    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})


def _strip(module: Any, kept: list[Any]) -> None:
    """Removes all parts and parameters but those of ``kept``, and what these are in."""
    module._is_hf_initialized = True  # or transformers looks for the parameters, to begin them
    for name, part in list(module.named_children()):
        if any(part is one for one in kept):
            continue
        if any(one is inner for one in kept for inner in part.modules()):
            _strip(part, kept)
        else:
            delattr(module, name)
    module._parameters.clear()


def _text_model(module: Any) -> Any:
    """The text model without its head in a whole, or in its half."""
    inner = module.get_decoder()
    if inner is module:
        inner = next((part for part in module.children() if isinstance(part, PreTrainedModel)), module)
    return module if inner is module else _text_model(inner)


def _half_in(whole: Any, auto: Any, half: Any) -> Any:
    """The half, of class ``auto`` and config ``half``, on the whole's own parts. A head that the whole has not stays
    on meta.
    """
    base = _text_model(whole)
    config = copy.deepcopy(half)
    config._experts_implementation = None  # a choice, which classes made elsewhere refuse to be told
    with torch.device("meta"):
        module = auto.from_config(config) if hasattr(auto, "from_config") else auto._from_config(config)
    own = _text_model(module)
    if type(own) is type(base):
        setattr(module, _name_of(own, module), base)
        module.config = base.config
    elif base.config.model_type in PLAIN:
        _take(own, base)
    else:
        raise TypeError(f"it has a {type(base).__name__}, and not a {type(own).__name__}")
    if module.get_output_embeddings() is not None:
        module.set_output_embeddings(whole.get_output_embeddings())
    module.generation_config = getattr(whole, "generation_config", None)
    return module.eval()


def _take(own: Any, base: Any) -> None:
    """Gives a text model the layers, parameters and buffers of one of another class, by their names.

    Raises TypeError where they have others.
    """
    if dict(own.named_parameters()).keys() != dict(base.named_parameters()).keys():
        raise TypeError(f"a {type(own).__name__} has other parts than its {type(base).__name__}")
    for name, part in list(own.named_modules()):
        theirs = base.get_submodule(name)
        if isinstance(part, nn.Linear):  # which may be there in few bits
            own.set_submodule(name, theirs)
        else:
            part._parameters, part._buffers = theirs._parameters, theirs._buffers


class PartNames:
    """What the tensors of the half are called in the whole, and the other way round."""

    def __init__(self, whole: Any, half: Any) -> None:
        self.whole, self.half = whole, half
        pairs = [(_text_model(whole), _text_model(half))]
        if half.get_output_embeddings() is not None:
            pairs.append((whole.get_output_embeddings(), half.get_output_embeddings()))
        self.pairs = [(_name_of(one, whole), _name_of(other, half)) for one, other in pairs]
        self.text = [_name_of(part, whole) for part in (_text_model(whole), whole.get_output_embeddings())]

    @classmethod
    def of(cls, config: Any) -> PartNames:
        """The names of a model that also sees, by its config; on modules without weights."""
        with torch.device("meta"):
            whole = _reading(config)(copy.deepcopy(config))
        return cls(whole, _half_in(whole, AutoModelForCausalLM, half_of(config, "")))

    @property
    def mapping(self) -> dict[str, str]:
        """From the beginnings of names in the whole, as patterns, to those in the half."""
        return {rf"^{re.escape(whole)}\.": f"{half}." for whole, half in self.pairs}

    @property
    def elsewhere(self) -> str:
        """A pattern of the names of all modules of the whole that are not of the text half."""
        return rf"(?!(?:{'|'.join(re.escape(part) for part in self.text)})(?:\.|$)).*"

    def in_half(self, name: str) -> str | None:
        """None for what is not of the half."""
        found = (half + name.removeprefix(whole) for whole, half in self.pairs if name.startswith(f"{whole}."))
        return next(found, None)

    def in_whole(self, name: str) -> str:
        return next(whole + name.removeprefix(half) for whole, half in self.pairs if name.startswith(f"{half}."))

    def others(self, stored: list[str]) -> Iterator[str]:
        """The names in a file that are not of the text half."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.whole)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        known = self.whole.state_dict()
        for name in stored:
            found, _ = rename_source_key(name, renamings, converters, self.whole.base_model_prefix, known)
            if not any(found.startswith(f"{part}.") for part in self.text):
                yield name


def _turning_back(whole: Any) -> list[Any]:
    """What is done to the tensors of a whole as they are written, with experts as its checkpoints have them.

    transformers, which reads these the other way round as well, turns none back; others read them in the one way only.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, Transpose

    mapping = copy.deepcopy(get_model_conversion_mapping(whole, add_legacy=False))
    found = [one for one in mapping if not isinstance(one, PrefixChange)]
    # In a square it could not tell which way round they are.
    square = any(p.ndim == 3 and p.shape[1] == p.shape[2] for p in whole.parameters())
    for operation in (operation for one in found for operation in getattr(one, "operations", ())):
        if isinstance(operation, Transpose) and not square:
            operation.check_dims = False
    return found


def _name_of(part: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in module.named_modules() if one is part)


def _say_what_is_written(path: Path, dtype: str, in_full: list[str] | None) -> None:
    """In a config: the ``dtype`` of weights, and what is ``in_full`` beside parts in few bits (None: all is)."""
    config = json.loads(path.read_bytes())
    for part in (config, config.get("text_config", {})):
        part.pop("torch_dtype", None)
        part["dtype"] = dtype
    if in_full is None:
        config.pop("quantization_config", None)
    else:
        about = config["quantization_config"]
        about["llm_int8_skip_modules"] = [*(about.get("llm_int8_skip_modules") or ()), *in_full]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _put_beside(folder: Path, files: Iterator[Path], names: PartNames) -> Iterable[str]:
    """Writes the other tensors of some files into a folder, each file's as one, and the index of all, whose names it
    returns.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    for number, path in enumerate(files):
        with safe_open(path, "pt") as file:
            if others := list(names.others(list(file.keys()))):
                part = {name: file.get_tensor(name) for name in others}
                save_file(part, folder / f"others-{number}.safetensors", metadata={"format": "pt"})
    (folder / INDEX).unlink(missing_ok=True)
    written = sorted(folder.glob("*.safetensors"))
    found: dict[str, str] = {}
    size = 0
    for number, path in enumerate(written, 1):
        name = f"model-{number:05}-of-{len(written):05}.safetensors"
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), name)
        size += path.stat().st_size
        path.rename(folder / f"{name}.part")
    for path in folder.glob("*.part"):
        path.rename(path.with_suffix(""))
    index = {"metadata": {"total_size": size}, "weight_map": found}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return found
