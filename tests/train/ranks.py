"""Two ranks on the CPU, for tests: `run_ranks` starts them, and as a script this file is one of them.

Starting Python with PyTorch takes longer than what the tests train, so one pair of processes works through a list of runs.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def start_ranks(jobs, world=2):
    """Start `world` processes that do `jobs` one after another; see `main` for what a job is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
                 "PYTHONWARNINGS": "error:`broadcast_buffers`:FutureWarning"}  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, __file__, json.dumps(jobs)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return processes


def run_ranks(jobs, world=2):
    """Do the jobs and return each rank's result of each job, [rank][job]; a rank that crashes is an error."""
    processes = start_ranks(jobs, world)
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return [[json.loads(line[1:]) for line in output.splitlines() if line.startswith("=")] for output in outputs]


def main(jobs):
    """Do jobs, and print "=" and a result for each.

    A job is {"recipe": JSON, "out": directory, "resume": bool} and perhaps "half_of": a run to go on from without its last checkpoint;
    "at_step" with the rank that gets "signal" or a "nan" there; the rank whose disk is full ("disk_full"); "file_bytes", "compiler".
    """
    sys.modules["torch.utils.tensorboard"] = None  # importing it costs seconds
    import shutil
    import signal

    import torch
    import torch.distributed as dist

    from ssa.config import read_recipe
    from ssa.data.prefetch import Prefetcher
    from ssa.errors import UserError
    from ssa.ranks import SharedError
    from ssa.train import activation_checkpoint, checkpoint, saver, trainer
    from ssa.train.loss import StepLoss

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    get, forward, write = Prefetcher.get, StepLoss.forward, saver.write_safetensors
    for job in jobs:
        at = job.get("at_step", -1)
        now, streams = [-1], []

        def watched(self, step, now=now, at=at, job=job):
            now[0] = step
            if step == at and rank == job.get("signal"):
                os.kill(os.getpid(), signal.SIGTERM)
            return get(self, step)

        def poisoned(self, rows, stream, targets, now=now, at=at, job=job, streams=streams):
            loss, shares = forward(self, rows, stream, targets)
            streams.append(stream)
            return loss * (float("nan") if now[0] == at and rank == job.get("nan") else 1), shares

        def full(*arguments, job=job):
            if rank == job.get("disk_full"):
                raise OSError(28, "No space left on device")
            return write(*arguments)

        Prefetcher.get, StepLoss.forward, saver.write_safetensors = watched, poisoned, full
        checkpoint.FILE_BYTES = job.get("file_bytes", 1 << 30)
        if "half_of" in job and rank == 0:
            shutil.copytree(job["half_of"], job["out"])
            shutil.rmtree(sorted((Path(job["out"]) / "checkpoints").iterdir())[-1])
        activation_checkpoint.COMPILER = job.get("compiler", "inductor")
        moves = []
        step = torch.optim.AdamW.step
        torch.optim.AdamW.step = lambda self, *a, step=step, moves=moves: (moves.append(1), step(self, *a))[1]
        try:
            result = trainer.train(read_recipe(job["recipe"]), job["out"], resume=job.get("resume", False))
            said = {"step": result.step, "stopped_by": result.stopped_by, "validation": result.validation}
        except UserError as error:
            said = {"error": str(error), "shared": isinstance(error, SharedError)}
        torch.optim.AdamW.step = step
        print("=" + json.dumps(said | {"streams": streams, "moves": len(moves)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    main(json.loads(sys.argv[1]))
