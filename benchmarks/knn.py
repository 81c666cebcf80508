"""How fast nearest neighbours are found: `python -m benchmarks.knn --bank 100000 --queries 5000 --dim 384`.

Beside dino.evaluator.neighbours stand the matrix product alone, which is the floor of any exact search, scikit-learn's
brute force and faiss's IndexFlatIP (the anchors), each on as many queries as it says: a part of them where it is
slow. All of them search the same made-up features for the same k = 200 neighbours. `--device cuda`: ours and the
product on a GPU.
"""

import argparse
import re
import resource
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dino.evaluator.neighbours import BLOCK, OFFICIAL, WIDTH, knn_predictions, nearest

K = max(OFFICIAL)
Search = Callable[[Tensor], object]


class Peak:
    """Mebibytes that a block of code takes above what was there before: of the GPU's memory, or of this process's."""

    def __init__(self, device: str) -> None:
        self.device, self.mib = device, 0.0

    def __enter__(self) -> "Peak":
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = self.most = resident()
            self.done = threading.Event()
            self.watch = threading.Thread(target=self._watch, daemon=True)
            self.watch.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.most = torch.cuda.max_memory_allocated()
        else:
            self.done.set()
            self.watch.join()
        self.mib = max(0, self.most - self.before) / 2**20


def resident() -> int:
    """Bytes; Linux's count, elsewhere the largest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def product(bank: Tensor) -> Search:
    """In the blocks of dino.evaluator.neighbours, each written over the one before."""

    def run(queries: Tensor) -> None:
        width = min(WIDTH, len(bank))
        for part in bank.split(width):
            for rows in queries.split(BLOCK // width):
                rows @ part.T

    return run


def scikit_learn(bank: Tensor) -> Search:
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(bank.numpy())
    return lambda queries: index.kneighbors(queries.numpy())


def faiss_flat(bank: Tensor, threads: int) -> Search:
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return lambda queries: index.search(queries.numpy(), K)


def timed(search: Search, queries: Tensor, device: str) -> tuple[float, float]:
    """(seconds, MiB at the peak)."""
    search(queries[:32])  # warm up
    with Peak(device) as peak:
        begin = time.perf_counter()
        search(queries)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds, peak.mib


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--bank", type=int, default=100_000)
    options.add_argument("--queries", type=int, default=5_000)
    options.add_argument("--dim", type=int, default=384)
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--part", type=int, default=500, help="of the queries, for scikit-learn")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--threads", type=int, default=1, help="on the CPU")
    chosen = options.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    device = chosen.device
    if device == "cuda" and not torch.cuda.is_available():
        print("This torch sees no CUDA device: on the CPU instead.\n")
        device = "cpu"

    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        F.normalize(torch.randn(n, chosen.dim, generator=generator)) for n in (chosen.bank, chosen.queries)
    )
    labels = torch.randint(chosen.classes, (chosen.bank,), generator=generator)
    there, asked, known = (x.to(device) for x in (bank, queries, labels))
    part = min(chosen.part, len(queries))
    rows: dict[str, tuple[Search, Tensor, str]] = {
        "the matrix product alone": (product(there), asked, device),
        f"dino.evaluator.neighbours.nearest, k = {K}": (lambda of: nearest(there, of, K), asked, device),
        f"the same and the votes of k = {', '.join(map(str, OFFICIAL))}": (
            lambda of: knn_predictions((there, known), of),
            asked,
            device,
        ),
        f"scikit-learn, brute force, k = {K}, on the CPU": (scikit_learn(bank), queries[:part], "cpu"),
    }
    if find_spec("faiss"):
        rows[f"faiss, IndexFlatIP, k = {K}, on the CPU"] = (faiss_flat(bank, chosen.threads), queries, "cpu")

    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    gpu = f" and {torch.cuda.get_device_name()}" if device == "cuda" else ""
    print(
        f"{found.group(1) if found else 'unknown CPU'}, {chosen.threads} threads{gpu}; torch {torch.__version__}; "
        f"bank of {chosen.bank} x {chosen.dim} ({bank.nbytes / 2**20:.0f} MiB), a block {4 * BLOCK / 2**20:.0f} MiB"
    )
    print("\n| | queries | s | ms a query | MiB beyond the features |\n|---|---|---|---|---|")
    for name, (search, of, where) in rows.items():
        seconds, mib = timed(search, of, where)
        print(f"| {name} | {len(of)} | {seconds:.2f} | {1e3 * seconds / len(of):.2f} | {mib:.0f} |")
    if not find_spec("faiss"):
        print("\nfaiss is not installed.")


if __name__ == "__main__":
    main()
