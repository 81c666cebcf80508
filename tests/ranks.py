"""Runs a function in several processes that are connected by gloo; what each returns comes back, by rank."""

import os
import socket
import tempfile
import traceback
from pathlib import Path

import torch
import torch.multiprocessing

from dino.runtime.processes import processes


def run_in_ranks(count, function, *arguments, timeout=120):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder, f"{rank}.pt") for rank in range(count)]
        workers = [
            context.Process(target=_rank, args=(rank, count, port, answer, function, arguments))
            for rank, answer in enumerate(answers)
        ]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join(timeout)
                assert not worker.is_alive(), "a rank hangs"
        finally:
            for worker in workers:
                worker.kill()
        returned = [torch.load(answer, weights_only=False) for answer in answers]
    for failure, _ in returned:
        assert failure is None, failure
    return [answer for _, answer in returned]


def _rank(rank, count, port, path, function, arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        with processes(torch.device("cpu")):
            answer = function(*arguments)
    except BaseException:
        torch.save((traceback.format_exc(), None), path)
    else:
        torch.save((None, answer), path)
