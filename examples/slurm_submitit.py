"""Train on a SLURM cluster by submitit (pip install submitit), one process per GPU. The options are `betaclip train`'s:

    python examples/slurm_submitit.py --config vit_b16_sharegpt4v_ce --run.name first --data.annotations FILE.json

A preempted job, and one whose time is over, saves a checkpoint, is queued again, and goes on from there.
"""

import signal
import sys

import submitit

from betaclip import cli
from betaclip.errors import Stopped

NODES, GPUS_PER_NODE, HOURS = 2, 4, 24


class Train:
    """A run with these options of `betaclip train`, run.name among them."""

    def __init__(self, *options):
        self.options = options

    def __call__(self):
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        # The trainer saves at SIGUSR1 and leaves with Stopped; only then may submitit's handler end the job.
        requeue = signal.getsignal(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGUSR1))
        try:
            cli.main(["train", "--run.resume", *self.options])
        except Stopped:
            requeue(signal.SIGUSR2, None)

    def checkpoint(self):
        """Called by submitit's handler: the job to queue in place of this one."""
        return submitit.helpers.DelayedSubmission(Train(*self.options))


def executor(folder, cluster=None):
    made = submitit.AutoExecutor(folder, cluster=cluster)
    made.update_parameters(
        name="betaclip", nodes=NODES, tasks_per_node=GPUS_PER_NODE, gpus_per_node=GPUS_PER_NODE, cpus_per_task=8,
        timeout_min=60 * HOURS, slurm_signal_delay_s=300,
    )  # fmt: skip
    return made


if __name__ == "__main__":
    job = executor("slurm/%j").submit(Train(*sys.argv[1:]))
    print(f"submitted {job.job_id}; its output goes to {job.paths.stdout}")
