"""`--device-map` and `--load-in`: a model that is larger than one GPU, placed by accelerate or loaded with fewer bits.

accelerate puts each module on a device, and moves what a module takes to where its weights are. Weights on "cpu" beside
a GPU, or on "disk", come to the device for the module's forward pass. bitsandbytes stores matrices as int8 (LLM.int8)
or as 4-bit NormalFloat (QLoRA), and multiplies in the compute dtype.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_granary.common.errors import ConfigError
from sae_granary.common.signed import parse_object
from sae_granary.models.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's, for all GPUs and then the CPU
_DEVICE = re.compile(r"cpu|disk|mps|cuda|cuda:\d+")


def parse_device_map(value: object) -> str:
    """A strategy, a device, or a mapping of module paths to devices -> the same as a string, mappings as JSON."""
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        places: Mapping[Any, object] = {"": value.strip()}
        if value.strip() in STRATEGIES:
            return value.strip()
    elif isinstance(value, str):
        try:
            places = parse_object(value.encode())
        except ValueError as error:
            raise ConfigError(f"device_map={value}: {error}") from None
    elif isinstance(value, Mapping):
        places = value
    else:
        places = {"": value}
    named = {str(path): f"cuda:{place}" if _is_number(place) else str(place) for path, place in places.items()}
    if not named:
        raise ConfigError('device_map={}: expected JSON that gives each module a device, such as {"": "cuda:0"}')
    if bad := [place for place in named.values() if not _DEVICE.fullmatch(place)]:
        raise ConfigError(
            f"device_map={bad[0]!r}: expected {', '.join(STRATEGIES)}, a device (cpu, cuda:1, disk), or JSON that "
            'gives modules a device, such as {"embeddings": 0, "encoder": 1}'
        )
    return named[""] if list(named) == [""] else json.dumps(named, sort_keys=True)


def _is_number(place: object) -> bool:
    return str(place).isascii() and str(place).isdigit()


@dataclass(frozen=True)
class Placement:
    """How a model is loaded; empty for one device and all bits of the compute dtype."""

    device_map: str = ""  # as `parse_device_map` gives it
    load_in: str = ""  # 8bit or 4bit

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Placement:
        """As the record of a model says."""
        return cls(str(record.get("device_map") or ""), str(record.get("load_in") or ""))

    def record(self) -> dict[str, str]:
        """The entries of a record: only what was asked for."""
        return {name: value for name, value in vars(self).items() if value}

    @property
    def given(self) -> bool:
        """Whether anything was asked for."""
        return bool(self.device_map or self.load_in)

    def spread(self) -> Placement:
        """For the model with its head, whose modules have other paths: a map by path becomes `auto`."""
        return Placement("auto" if self.device_map.startswith("{") else self.device_map, self.load_in)

    def check(self, device: str) -> None:
        """Raise ModelError, with the remedy, where a package or a GPU is missing, and where device and map differ."""
        if self.load_in and not device.startswith("cuda"):
            raise ModelError(f"--load-in {self.load_in} needs a GPU, and the device is {device}: leave it out")
        if self.load_in:
            _need("bitsandbytes", f"--load-in {self.load_in}", "quantized")
        if self.given:
            _need("accelerate", f"--device-map {self.device_map or device}", "large")
        if self._places() == {"disk"}:
            raise ModelError("--device-map disk keeps no module anywhere: name modules, as JSON, or use auto")
        if (kind := self._only_kind()) and kind != device.split(":")[0]:
            raise ModelError(f"--device-map {self.device_map} computes on {kind}: add --device {kind}")

    def _only_kind(self) -> str:
        """cuda, cpu or mps where the map says on which of them the model computes; empty where accelerate chooses."""
        if not self.device_map or self.device_map in STRATEGIES:
            return ""
        kinds = {place.split(":")[0] for place in self._places()}
        return next((kind for kind in ("cuda", "mps") if kind in kinds), "cpu")

    def _places(self) -> set[str]:
        """The devices of the map, or its strategy."""
        return set(json.loads(self.device_map).values()) if self.device_map.startswith("{") else {self.device_map}

    def arguments(self, device: str, compute_dtype: str) -> dict[str, Any]:
        """Arguments for `from_pretrained`; none where nothing was asked for. Raises as `check`."""
        if not self.given:
            return {}
        self.check(device)
        wanted = json.loads(self.device_map) if self.device_map.startswith("{") else self.device_map
        found: dict[str, Any] = {"device_map": wanted or {"": device}}
        if "disk" in self.device_map or self.device_map in STRATEGIES:
            # weights that are not in safetensors, or are changed as they are loaded; removed when the process ends
            found["offload_folder"] = _folder().name
        if self.load_in:
            found["quantization_config"] = _quantization(self.load_in, compute_dtype)
        return found

    def placed(self, model: nn.Module, device: str) -> nn.Module:
        """The loaded model, on the device unless it has its places already."""
        return model if self.given else model.to(device)


NOT_PLACED = Placement()
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _folder() -> tempfile.TemporaryDirectory[str]:
    if not _FOLDERS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="granary_offload_", ignore_cleanup_errors=True))
    return _FOLDERS[0]


def _need(package: str, option: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{option} needs {package}: pip install 'sae-granary[{extra}]', or leave it out")


def _quantization(load_in: str, compute_dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, compute_dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def input_device(base: nn.Module) -> torch.device:
    """Where a loaded model takes token ids: of its first weights that stay on a device."""
    import torch

    devices = (parameter.device for parameter in base.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))
