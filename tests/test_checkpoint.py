"""Checkpoints: round trip, atomicity, and files that must be refused."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from mpc import checkpoint
from mpc.config import CheckpointInfo, MethodConfig, PixelSpec
from mpc.errors import MissingError, UserError


def info(**changes: Any) -> CheckpointInfo:
    fields: dict[str, Any] = {
        "config": MethodConfig().model_dump(mode="json"),
        "findings": ("Mass", "Nodule"),
        "image_size": 64,
        "pixels": PixelSpec(),
        "step": 12,
        "epoch": 1.5,
        "metrics": {"val_macro_auroc": 0.75, "epoch": 1},
        "thresholds": {"Mass": 0.25},
        "data_digest": "ab12",
        "git_commit": None,
        "versions": {"torch": torch.__version__},
    }
    return CheckpointInfo.model_validate({**fields, **changes})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    model, optimizer = trained()
    ema = {name: tensor * 0.5 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    state = {"step": 12, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "note": None}
    folder = tmp_path / "deep" / "step-12"
    checkpoint.save(folder, model, ema, state, info())

    assert names(folder) == [
        "checkpoint.json",
        "ema.safetensors",
        "model.safetensors",
        "training_state.pt",
    ]
    assert names(folder.parent) == ["step-12"]
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "checkpoint.json"}
    assert checkpoint.read_info(folder) == info(sizes=sizes)
    for kind, expected in (("model", model.state_dict()), ("ema", ema)):
        loaded = checkpoint.load_weights(folder, kind)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    loaded_state = checkpoint.load_training_state(folder)
    assert loaded_state["step"] == 12
    assert torch.equal(loaded_state["rng"], state["rng"])
    other = torch.optim.AdamW(network(1).parameters(), lr=0.5)
    other.load_state_dict(loaded_state["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1

    fresh = network(1)
    checkpoint.load_into(fresh, folder, "model")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


def test_optional_files_are_optional(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    checkpoint.save(folder, network(), None, None, info())
    assert names(folder) == ["checkpoint.json", "model.safetensors"]
    with pytest.raises(MissingError, match=r"no ema\.safetensors"):
        checkpoint.load_weights(folder, "ema")
    with pytest.raises(MissingError, match=r"no training_state\.pt"):
        checkpoint.load_training_state(folder)


def test_saving_again_replaces(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    checkpoint.save(folder, network(), network().state_dict(), {"step": 1}, info())
    checkpoint.save(folder, network(1), None, None, info(step=13))
    assert checkpoint.read_info(folder).step == 13
    assert names(folder) == ["checkpoint.json", "model.safetensors"]
    assert names(tmp_path) == ["last"]


class Unready(nn.Module):
    """A network whose weights cannot be fetched: the disk's or the device's fault in the middle of a save."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise OSError("lost the device")


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_traces(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    checkpoint.save(folder, network(), None, {"step": 1}, info())
    with pytest.raises(OSError, match="lost the device"):
        checkpoint.save(folder, Unready(), None, {"step": 2}, info(step=13))
    assert checkpoint.read_info(folder).step == 12
    assert checkpoint.load_training_state(folder) == {"step": 1}
    assert names(tmp_path) == ["last"]


KILLED = """
import os, sys, torch
from pathlib import Path
from tests.test_checkpoint import info, network
from mpc import checkpoint
class Fatal(dict):
    def items(self):
        os._exit(9)
checkpoint.save(Path(sys.argv[1]), network(), Fatal(), None, info())
"""


def test_a_killed_save_is_never_seen_as_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=root, env=environment, check=False)
    assert result.returncode == 9
    assert not folder.exists()
    assert all(name.startswith(".step-1.new-") for name in names(tmp_path))
    with pytest.raises(MissingError, match=r"no checkpoint\.json"):
        checkpoint.read_info(folder)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    folder, target = tmp_path / "bad", tmp_path / "owned"
    checkpoint.save(folder, network(), None, {"step": 1}, info())
    path = folder / "training_state.pt"
    if form == "torch":
        torch.save({"step": Payload(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(target)))
    with pytest.raises(UserError, match=r"training_state\.pt: refused"):
        checkpoint.load_training_state(folder)
    assert not target.exists()
    torch.load(path, weights_only=False) if form == "torch" else pickle.loads(path.read_bytes())
    assert target.exists()  # the payload was live


def test_a_pickle_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    folder, target = tmp_path / "bad", tmp_path / "owned"
    checkpoint.save(folder, network(), None, None, info())
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(target)))
    with pytest.raises(UserError, match="not a safetensors file"):
        checkpoint.load_weights(folder, "model")
    assert not target.exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "pickle", "no dict", "noise"])
def test_a_damaged_training_state_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "bad"
    checkpoint.save(folder, network(), None, {"step": 1, "values": torch.arange(1000)}, info())
    path = folder / "training_state.pt"
    whole = path.read_bytes()
    at = whole.index(b"values")
    changed = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "pickle": pickle.dumps({"step": 1}),
        "noise": whole[: at - 4] + b"\xff" * 8 + whole[at + 4 :],
    }
    if damage == "no dict":
        torch.save([1, 2], path)
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(UserError) as caught:
        checkpoint.load_training_state(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    checkpoint.save(folder, network(), None, None, info())
    tensors = checkpoint.load_weights(folder, "model")
    cases = {
        "0.weight: the network has (4, 3), the file nothing": {k: v for k, v in tensors.items() if k != "0.weight"},
        "extra: the network has no such tensor, the file (1,)": {**tensors, "extra": torch.zeros(1)},
        "2.bias: the network has (2,), the file (5,)": {**tensors, "2.bias": torch.zeros(5)},
    }
    for message, changed in cases.items():
        save_file(changed, folder / "model.safetensors")
        model = network(1)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(UserError) as caught:
            checkpoint.load_into(model, folder, "model")
        assert message in str(caught.value)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2, this software reads 1"),
        ({"schema_version": None}, "schema_version None"),
        ({"findings": 3}, "findings"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_foreign_metadata_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "last"
    checkpoint.save(folder, network(), None, None, info())
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        checkpoint.read_info(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"checkpoint\.json"):
        checkpoint.read_info(tmp_path)


@pytest.mark.parametrize("value", [nn.Linear(1, 1), {"a": [object()]}, {"scale": torch.float32}])
def test_state_that_could_not_be_read_back_is_refused_on_saving(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="tensors and plain values only"):
        checkpoint.save(tmp_path / "x", network(), None, {"method": value}, info())
    assert names(tmp_path) == []


def test_metadata_is_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        info(step=-1)
    with pytest.raises(ValidationError):
        info().step = 3
