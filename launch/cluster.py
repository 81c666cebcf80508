"""What SLURM says of itself."""

import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any


def scontrol(*arguments: str) -> str:
    """What it prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def remarks(settings: Mapping[str, Any]) -> Iterator[str]:
    """What this cluster will not do for a job, of these settings of slurm.yaml, that should survive."""
    config = dict(re.findall(r"^(\w+)\s*= (\S+)", scontrol("show", "config"), re.MULTILINE))
    if config.get("JobRequeue") == "0" and not (settings["additional_parameters"] or {}).get("requeue"):
        yield "this cluster requeues only jobs that ask for it; set additional_parameters.requeue to true."
    preempts = config.get("PreemptType", "preempt/none")
    for line in scontrol("--oneliner", "show", "partition").splitlines() if preempts != "preempt/none" else ():
        partition = dict(re.findall(r"(\w+)=(\S+)", line))
        name, asked = partition["PartitionName"], settings["partition"]
        mine = name in asked.split(",") if asked else partition["Default"] == "YES"
        kills = re.search("REQUEUE|CANCEL", partition.get("PreemptMode") or config["PreemptMode"])
        if mine and kills and partition["GraceTime"] == "0":
            by_qos = " (a QOS may have one)" if preempts == "preempt/qos" else ""
            yield (
                f"partition {name} has no GraceTime{by_qos}: a pre-empted job is killed {config['KillWait']} s after "
                "its signal. Where a step and its checkpoint take longer, the run goes on from the checkpoint before."
            )
