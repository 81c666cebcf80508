"""Whole programs on a GPU, started together: each test looks at one. Two minutes in all."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DINO_TEST_DATA", ROOT.parent / "shared" / "data"))
NEEDS_DATA = pytest.mark.skipif(
    not (DATA / "imagenette2-160").is_dir(), reason="no copy of ImageNette at DINO_TEST_DATA"
)
SMALL = ["dataset.train.images=512", "dataset.val.images=128", "training.epochs=2", "training.num_workers=1"]
VIT = [*SMALL, "backbone.depth=2", "backbone.drop_path=0.2"]
IMAGENETTE = ["dataset=imagenette", f"dataset.root={DATA}", "backbone=resnet_small", "training.num_workers=2"]
SHORT = ["training.max_steps=20", "training.batch_size=64"]
EAGER = ["compile=false", "graph=false"]
EXACT = [*VIT, "deterministic=true", "evaluator=none"]
PROGRAMS = {
    "default": VIT,
    "no compiler": [*SMALL, "backbone=resnet_small"],
    "fp16": [*SMALL, *EAGER, "backbone=resnet_small", "precision=fp16"],
    "whole": EXACT,
    "killed": [*EXACT, "checkpoint.every_epochs=1"],
    "ddp": [*SMALL, "backbone=resnet_small"],
    "fsdp": [*SMALL, *EAGER, "training.sharded=true"],
    "out of memory": [*SMALL, *EAGER, "training.batch_size=512", "augmentation.global_size=3000"],
    "stopped": VIT,
}
OF_PHOTOGRAPHS = {
    "cached": [*IMAGENETTE, *SHORT, *EAGER, "dataset.cache=device"],
    "decoded": [*IMAGENETTE, *SHORT, *EAGER, "training.device_does=decode", "evaluator=none"],
}
TORCHRUN = {"ddp": 29541, "fsdp": 29542}  # ports


def start(name, folder, overrides):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }
    if name == "no compiler":
        environment |= {
            "CC": "/nowhere/cc",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "none"),
            "TRITON_CACHE_DIR": str(folder / "t"),
        }
    python = [sys.executable]
    if name in TORCHRUN:
        ranks = ["--nproc-per-node", "1", "--master-port", str(TORCHRUN[name])]
        python += ["-m", "torch.distributed.run", *ranks]
    return subprocess.Popen(
        [*python, "-m", "dino.train", *overrides, f"name={name.replace(' ', '_')}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=170)
    return process.returncode, said


def killed_after_a_checkpoint(folder, overrides):
    process = start("killed", folder, overrides)
    checkpoints = folder / "outputs" / "killed" / "checkpoints"
    while process.poll() is None and not [*checkpoints.glob("step_*.pt")]:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    finish(process)
    return finish(start("killed", folder, overrides))


def stopped_while_it_compiles(folder, overrides):
    process = start("stopped", folder, overrides)
    log = folder / "outputs" / "stopped" / "train.log"
    while process.poll() is None and not (log.exists() and "compiling" in log.read_text()):
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    return finish(process)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(status, words) of each program, and the folder in which they ran."""
    folder, results = tmp_path_factory.mktemp("programs"), {}
    ways = {"killed": killed_after_a_checkpoint, "stopped": stopped_while_it_compiles}
    programs = PROGRAMS | (OF_PHOTOGRAPHS if (DATA / "imagenette2-160").is_dir() else {})

    def follow(name, overrides):
        if name in ways:
            results[name] = ways[name](folder, overrides)
        else:
            results[name] = finish(start(name, folder, overrides))

    threads = [threading.Thread(target=follow, args=program) for program in programs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return folder / "outputs", results


@pytest.mark.parametrize("name", ["default", "fp16", "ddp", "fsdp", "whole", "killed"])
def test_a_run_ends_well(done, name):
    status, said = done[1][name]
    assert status == 0, said[-3000:]
    assert (done[0] / name / "teacher.safetensors").is_file()


def test_the_default_run_is_compiled_and_captured_and_measures_k_nn(done):
    said = done[1]["default"][1]
    assert "compiling" in said and "k-NN" in said
    assert "cannot be" not in said


def test_a_machine_without_a_compiler_trains_with_a_warning(done):
    status, said = done[1]["no compiler"]
    assert status == 0, said[-3000:]
    assert len(re.findall("a step cannot be compiled here", said)) == 1
    assert "Traceback" not in said


def test_a_killed_run_ends_with_the_very_weights_where_kernels_are_deterministic(done):
    last = [max((done[0] / name / "checkpoints").glob("step_*.pt")) for name in ("whole", "killed")]
    assert last[0].name == last[1].name
    whole, killed = (torch.load(path, map_location="cpu", weights_only=True) for path in last)
    for key in ("student_state_dict", "teacher_state_dict", "optimizer_state_dict", "dino_loss_center"):
        pairs = [*zip(tree_leaves(whole[key]), tree_leaves(killed[key]), strict=True)]
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs), key


def test_sigterm_while_it_compiles_ends_the_program_in_a_sentence(done):
    status, said = done[1]["stopped"]
    assert status == 128 + signal.SIGTERM, said[-3000:]
    assert "stopped by SIGTERM" in said and "Traceback" not in said


def test_out_of_memory_is_a_sentence_with_the_overrides_to_try(done):
    status, said = done[1]["out of memory"]
    assert status == 6, said[-3000:]
    assert "out of memory" in said and "training.batch_size=256" in said
    assert "Traceback" not in said


@NEEDS_DATA
def test_images_cached_on_the_gpu_are_trained_on_measured_and_shown(done):
    status, said = done[1]["cached"]
    assert status == 0, said[-3000:]
    assert "not written" not in said
    assert (done[0] / "cached" / "report.html").is_file()


@NEEDS_DATA
def test_nvjpeg_decodes_on_the_gpu(done):
    status, said = done[1]["decoded"]
    assert status == 0, said[-3000:]
    assert "passed over" not in said
