"""Slurm by a batch script; a job's folder on the shared disk is all that is known of it."""

import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from infra.cluster import ClusterConfig
from infra.slurm.script import CODE, LOG, SCRIPT, batch_script
from infra.submit import tools
from infra.submit.package import Job
from infra.submit.target import State, Status
from mpc.errors import MissingError

POLL_SECONDS = 5.0
ID = "slurm_id"
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")


class Slurm:
    """The Slurm of this machine."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.folder = Path(cluster.slurm.folder).expanduser().absolute()

    def on_this_machine(self) -> bool:
        """Nodes see what is shared."""
        return False

    def plan(self, job: Job) -> str:
        """The batch script."""
        return batch_script(self.cluster.slurm, job, str(self.folder / job.name), self.cluster.python)

    def submit(self, job: Job) -> None:
        """Unpacks the package into the job's folder and queues its script."""
        tools.require("sbatch")
        folder = self.folder / job.name
        folder.mkdir(parents=True, mode=0o700)
        with zipfile.ZipFile(io.BytesIO(job.package)) as package:
            package.extractall(folder)
        script = folder / SCRIPT
        script.write_text(self.plan(job), encoding="utf-8")
        number = tools.call(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]
        (folder / ID).write_text(f"{number}\n", encoding="utf-8")

    def state(self, name: str) -> State:
        """Its exit code, which the verb has left behind, else what the queue says."""
        folder = self._folder(name)
        if (folder / CODE).is_file() and (text := (folder / CODE).read_text().strip()):
            code = int(text)
            return State(Status.FAILED if code else Status.SUCCEEDED, f"exit code {code}", code)
        number = self._number(name)
        queued = tools.call(["squeue", "--noheader", "--format=%T %r", "--states=all", f"--jobs={number}"]).strip()
        return state_of(queued, number)

    def logs(self, name: str, follow: bool) -> Iterator[str]:
        """The script's output."""
        log = self._folder(name) / LOG
        at = 0
        while True:
            ended = not follow or self.state(name).status.ended
            if log.is_file():
                with log.open(encoding="utf-8", errors="replace") as stream:
                    stream.seek(at)
                    text = stream.read()
                    at = stream.tell()
                if text:
                    yield text
            if ended:
                return
            time.sleep(POLL_SECONDS)

    def stop(self, name: str) -> None:
        """Takes the job out of the queue, or ends it."""
        tools.call(["scancel", self._number(name)])

    def _folder(self, name: str) -> Path:
        folder = self.folder / name
        if Path(name).name != name or not folder.is_dir():
            raise MissingError(f"job {name}: is not known in {self.folder}; mend its name or cluster.slurm.folder")
        return folder

    def _number(self, name: str) -> str:
        """Slurm's own number of a job."""
        file = self._folder(name) / ID
        if not file.is_file():
            raise MissingError(f"job {name}: sbatch never took it; submit it again")
        return file.read_text(encoding="utf-8").strip()


def state_of(queued: str, number: str) -> State:
    """What a line of squeue (state, reason) means for a job that has left no exit code; none: the queue forgot it."""
    status, _, reason = queued.partition(" ")
    if status in WAITING:
        return State(Status.WAITING, f"Slurm {number} {status.lower()} ({reason})")
    if status in ("RUNNING", "COMPLETING", "STAGE_OUT"):
        return State(Status.RUNNING, f"Slurm {number}")
    if status == "CANCELLED":
        return State(Status.STOPPED, f"Slurm {number} was cancelled")
    return State(Status.FAILED, f"Slurm {number} ended without the verb ({status.lower() or 'no longer queued'})")
