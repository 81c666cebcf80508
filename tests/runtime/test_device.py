"""Which GPU a run takes and draws from; CUDA is faked, as far as it is asked."""

import os
from types import SimpleNamespace

import pytest
import torch

import dino.visualize
from dino.config import CONF, compose
from dino.evaluate import evaluate
from dino.run.parts import assemble
from dino.runtime import device
from dino.runtime.rng import rng_state, set_rng_state
from dino.train import run


class Chosen(Exception):
    """Ends a program at the moment at which it makes a device the current one."""


class Gpus:
    """`count` GPUs, each with a random state of its own; any use of them initialises CUDA, which makes a context."""

    def __init__(self, monkeypatch, count=2):
        self.current, self.initialised = 0, False
        self.states = [torch.tensor([index, 0], dtype=torch.uint8) for index in range(count)]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.initialised)
        monkeypatch.setattr(torch.cuda, "set_device", self.set_device)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.get_rng_state)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set_rng_state)

    def index(self, device):
        index = torch.device(device).index
        return self.current if index is None else index

    def set_device(self, device):
        self.current, self.initialised = self.index(device), True

    def get_rng_state(self, device="cuda"):
        self.initialised = True
        return self.states[self.index(device)].clone()

    def set_rng_state(self, state, device="cuda"):
        self.initialised = True
        self.states[self.index(device)] = state.clone()


PROGRAMS = {
    "train": lambda path: run(compose(["device=cuda:1"], "train", CONF), path),
    "build": lambda path: assemble(compose(["device=cuda:1"], "train", CONF)),
    "evaluate": lambda path: evaluate(
        compose(["backbone=resnet_small", "dataset=textures", "device=cuda:1", f"output={path}"], "evaluate", CONF)
    ),
    "visualize": lambda path: dino.visualize.show(
        compose([f"checkpoint={path}", f"images={path}", "device=cuda:1"], "visualize", CONF)
    ),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_the_gpu_that_is_chosen_becomes_the_current_one_also_for_one_process(tmp_path, monkeypatch, program):
    def chosen(name):
        raise Chosen(str(name))

    Gpus(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    monkeypatch.setattr(dino.visualize, "load_teacher", lambda *_: None)
    with pytest.raises(Chosen, match="cuda:1"):
        program(tmp_path)


def test_data_workers_take_the_cores_of_a_process_but_one(monkeypatch):
    monkeypatch.setattr(device, "usable_cores", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [device.default_workers(torch.device(kind)) for kind in ("cuda", "mps", "cpu")] == [15, 15, 0]
    for processes, workers in ((2, 7), (8, 1), (16, 1), (32, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert device.default_workers(torch.device("cuda")) == workers


def test_the_random_state_is_that_of_the_current_gpu(monkeypatch):
    gpus = Gpus(monkeypatch)
    torch.cuda.set_device("cuda:1")
    gpus.states[1] = torch.tensor([1, 7], dtype=torch.uint8)
    saved = rng_state()
    assert saved["cuda"].tolist() == [1, 7]
    gpus.states[1] = torch.tensor([1, 8], dtype=torch.uint8)
    set_rng_state(saved)
    assert [state.tolist() for state in gpus.states] == [[0, 0], [1, 7]]


def test_a_run_on_the_cpu_makes_no_cuda_context(monkeypatch):
    gpus = Gpus(monkeypatch)
    on_gpu = {**rng_state(), "cuda": torch.zeros(2, dtype=torch.uint8)}
    assert rng_state()["cuda"] is None
    set_rng_state(on_gpu)  # of a run that goes on without its GPU
    assemble(compose(["device=cpu", "dataset.train.images=64", "dataset.val.images=10"], "train", CONF))
    assert not gpus.initialised


@pytest.mark.parametrize(
    ("bf16", "capability", "chosen"), [(True, (8, 0), "bf16"), (False, (7, 5), "fp16"), (False, (6, 0), "fp32")]
)
def test_a_gpu_computes_in_the_half_precision_that_its_tensor_cores_have(monkeypatch, bf16, capability, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: capability)
    assert device.choose_precision("auto", torch.device("cuda")) == chosen
    assert device.choose_precision("fp32", torch.device("cuda")) == "fp32"


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_are_the_fastest_or_the_same_each_time(monkeypatch, deterministic):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, warn_only: asked.append((mode, warn_only)))
    for flags, name in ((torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32")):
        monkeypatch.setattr(flags, name, deterministic)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    device.choose_kernels(deterministic, torch.device("cuda"))
    assert asked == [(deterministic, True)]  # an operation without such a kernel is a warning, not the end
    assert torch.backends.cudnn.benchmark is torch.backends.cudnn.allow_tf32 is not deterministic
    assert torch.backends.cuda.matmul.allow_tf32 is not deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
