"""Load checkpoints into a sharded model and optimizer, as an unsharded model, or tensor by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from olmo_train import config as configuration
from olmo_train.checkpoint.folders import base_of, read_state, resolve
from olmo_train.checkpoint.format import open_reader
from olmo_train.errors import CheckpointError
from olmo_train.model.adapter import adapt, is_adapter, merged, own_parameters
from olmo_train.model.config import AdapterConfig, ModelConfig
from olmo_train.model.transformer import Transformer
from olmo_train.parallel.shard import DTYPES
from olmo_train.parallel.world import World


def load_model(folder: str | Path) -> Transformer:
    """The Transformer of a checkpoint folder, or of a run_dir's newest: fp32, on the CPU, in eval mode. Adapters are merged into
    the weights of their base.

    Raises CheckpointError when the folder is damaged or does not hold this model's weights.
    """
    folder = resolve(Path(folder))
    shape = configuration.build(ModelConfig, configuration.read([folder / "config.yaml"])["model"], "model")
    with torch.device("meta"):
        model = Transformer(shape)
    model.to_empty(device="cpu")
    wanted = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    if "base" in read_state(folder):
        read = WeightReader(folder)
        for name, tensor in wanted.items():
            tensor.copy_(read(name.removeprefix("model.")))
    else:
        _read_tensors(folder, wanted, prefix="model.", group=None)
    return model.eval()


def load(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Fill the model and the optimizer, sharded in any way, from a checkpoint; returns its state.json. Of a model with adapters
    only these are filled: `load_weights` loads the weights of the base.

    A converted checkpoint may have only weights (optimizer_steps null): then the optimizer is not changed.
    """
    state = read_state(folder)
    tensors = state_tensors(model, optimizer)
    if state["optimizer_steps"] is None:
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        _read_tensors(folder, weights, prefix="model.", group=world.control_group)
        return state
    _read_tensors(folder, tensors, prefix="", group=world.control_group)
    for values in optimizer.state.values():
        values["step"].fill_(state["optimizer_steps"])
    return state


def load_weights(folder: Path, model: Transformer, world: World) -> None:
    """Fill the model, sharded in any way, with a checkpoint's weights only; adapters are not changed."""
    wanted = {f"model.{name}": p.detach() for name, p in model.named_parameters() if not is_adapter(name)}
    _read_tensors(folder, wanted, prefix="model.", group=world.control_group)


class WeightReader:
    """Reads the weights of a checkpoint folder one full tensor at a time, on the CPU, without loading the whole model. Adapters
    are merged in fp32 into the weights of their base as they were trained with: rounded to the run's precision.

    Raises CheckpointError when a checkpoint with adapters lacks one or holds another, and ConfigError when the base is not found.
    """

    def __init__(self, folder: Path, moved_base: Path | None = None):
        """`moved_base`: where the base of adapters is now, if it is neither at init_from nor where it was."""
        self._storage = open_reader(folder)
        metadata = self._storage.read_metadata()
        self._storage.read_metadata = lambda: metadata  # read the files' headers once
        self._entries = metadata.state_dict_metadata
        self._base: WeightReader | None = None
        self.adapter = AdapterConfig()  # its kind is none for a checkpoint that holds all weights
        if record := read_state(folder).get("base"):
            values = configuration.read([folder / "config.yaml"])
            place = str(moved_base) if moved_base else configuration.decoded(values).get("init_from")
            base = base_of(folder, place, key="--base" if moved_base else "init_from")
            assert base is not None
            self._base, self._dtype = WeightReader(base), DTYPES[record["dtype"]]
            self.adapter = configuration.build(AdapterConfig, values["adapter"], "adapter")
            self._check_adapters(folder, configuration.build(ModelConfig, values["model"], "model"))

    def _check_adapters(self, folder: Path, shape: ModelConfig) -> None:
        with torch.device("meta"):
            adapters = own_parameters(adapt(Transformer(shape), self.adapter))
        check_shapes(folder, self.shapes(), {f"model.{name}": parameter.shape for name, parameter in adapters.items()})

    def __call__(self, name: str) -> Tensor:
        """The weight called `name`, with its adapter merged into it."""
        weight = self.unmerged(name)
        prefix = f"model.{name.removesuffix('weight')}adapter."
        adapter = {key.removeprefix(prefix): self._read(key) for key in self._entries if key.startswith(prefix)}
        return merged(weight, adapter, self.adapter.scale) if adapter else weight

    def unmerged(self, name: str) -> Tensor:
        """The parameter called `name` of the model with adapters: a frozen weight as the adapters were trained with, or a
        parameter of an adapter."""
        if self._base is None or is_adapter(name):
            return self._read(f"model.{name}")
        return self._base(name).to(self._dtype).float()

    def shapes(self) -> dict[str, torch.Size]:
        """{stored name, `model.NAME`: shape} of the weights that the folder itself holds."""
        return {name: entry.size for name, entry in self._entries.items() if name.startswith("model.")}

    def _read(self, key: str) -> Tensor:
        entry = self._entries[key]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        _load({key: tensor}, self._storage)
        return tensor


def state_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{name: tensor} of all tensors in a checkpoint. The optimizer's update count is the same for every weight and is saved in
    state.json. Weights that are frozen under adapters are not in it: they are those of the base."""
    tensors = {}
    for name, parameter in own_parameters(model).items():
        assert isinstance(parameter, DTensor), f"{name} is gathered: it would be saved unsharded and without its moments"
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():  # a frozen parameter has no state
            if key != "step":
                tensors[f"optim.{name}.{key}"] = value
    return tensors


def _read_tensors(folder: Path, wanted: dict[str, Tensor], prefix: str, group: Any) -> None:
    """Read tensors in place. Among names that start with `prefix`, names and shapes must match in both directions."""
    reader = open_reader(folder)
    stored = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items() if name.startswith(prefix)}
    check_shapes(folder, stored, {name: tensor.shape for name, tensor in wanted.items()})
    _load(wanted, reader, group)


def _load(wanted: dict[str, Tensor], reader: Any, group: Any = None) -> None:
    """Read tensors in place, with all processes of a group, or on this one alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)


def check_shapes(where: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError about the file or folder `where` unless it holds exactly the expected tensors: {name: shape}."""
    for name in [*sorted(found.keys() - expected.keys()), *expected]:
        stored, wanted = (tuple(shapes[name]) if name in shapes else "absent" for shapes in (found, expected))
        if stored != wanted:
            raise CheckpointError(where, f"{name} is {stored}, expected {wanted} for this model")
