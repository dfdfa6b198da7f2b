"""A recipe to SLURM through submitit: one task a GPU, and a time limit that ends in another turn.

submitit writes the batch script, the array and one log a task. Asking for another turn is left to
the run itself (equifeat.train.signals): submitit's own handler would answer in the middle of a
step, so its signal, USR2, is never sent.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from equifeat.errors import EquifeatError, MissingExtraError, RecipeError, SubmitError

if TYPE_CHECKING:
    from submitit import SlurmExecutor

# SLURM looks at the clock every half a minute and may send the signal a minute early.
_CLOCK_SECONDS = 60
_TIME = re.compile(
    r"(?P<minutes>\d+)(:(?P<seconds>\d{1,2}))?"
    r"|(?P<hours>\d+):(?P<minutes2>\d{1,2}):(?P<seconds2>\d{1,2})"
    r"|(?P<days>\d+)-(?P<hours3>\d{1,2})(:(?P<minutes3>\d{1,2})(:(?P<seconds3>\d{1,2}))?)?"
)
_UNIT_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class Job(NamedTuple):
    """What was asked of SLURM, checked.

    Attributes:
        name: Name of the job.
        nodes: Number of nodes.
        gpus: GPUs of a node as SLURM writes them, "4" or "a100:4"; empty for none.
        tasks: Tasks of a node.
        cpus: CPU cores of a task.
        minutes: Time limit.
        save_before: Seconds before the time limit at which the run saves.
        setup: Shell line that runs before the training.
        more: Further options of sbatch by name.
    """

    name: str
    nodes: int
    gpus: str
    tasks: int
    cpus: int
    minutes: int
    save_before: int
    setup: str
    more: dict[str, str | bool]


def submit_command(
    recipe: Sequence[Path],
    time: str,
    nodes: int = 1,
    gpus: str = "1",
    tasks: int | None = None,
    cpus_per_task: int | None = None,
    mem: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    constraint: str | None = None,
    name: str | None = None,
    array_seeds: str | None = None,
    save_before: int = 120,
    setup: str = "",
    fit: str = "",
    sbatch: str = "",
    dry_run: bool = False,
) -> str:
    """Submit a recipe to SLURM.

    Args:
        recipe: Recipe, and further files whose keys replace its own.
        time: Time limit of one turn as in SLURM, such as 12:00:00 or 2-00; the job queues again
            until the recipe is done.
        nodes: Number of nodes.
        gpus: GPUs of a node, such as 4 or a100:4; 0 trains on CPUs.
        tasks: Tasks of a node with --gpus 0; otherwise there is one a GPU.
        cpus_per_task: CPU cores of a task; without it, one more than the recipe's num_workers.
        mem: Memory of a node, such as 64G; without it, the cluster's default.
        partition: Partition of the cluster.
        account: Account that pays.
        constraint: Features that the nodes must have.
        name: Name of the job; without it, the recipe's.
        array_seeds: One run a seed as a job array, such as 0-4 or 0,7; each in its own folder.
        save_before: Seconds before the time limit at which the run saves and queues again.
        setup: Shell line that runs before the training, such as "module load cuda".
        fit: Further options of equifeat fit, as in --fit="--model.lr 1e-4 --run.dir runs/a".
        sbatch: Further options of sbatch, as in --sbatch="--qos=long --mail-type=END".
        dry_run: Print the batch script only.

    Returns:
        The job's number, where its run and its logs are; or the batch script.

    Raises:
        RecipeError: The recipe or an option is wrong.
        SubmitError: SLURM is not here, or refuses the job.
        ModelNameError: The recipe's backbone does not exist.
        MissingExtraError: submitit is not installed.
    """
    arguments = [word for path in recipe for word in ("--config", str(path))]
    arguments += _words("--fit", fit)
    fits: list[tuple[Path | None, list[str]]] = [(None, arguments)]
    if array_seeds is not None:
        run = Path(parse_recipe(arguments)["run"]["dir"])
        fits = [
            (
                run,
                [*arguments, "--seed_everything", str(seed), "--run.dir", f"{run}/seed_{seed}"],
            )
            for seed in parse_seeds(array_seeds)
        ]
    return submit_fits(
        [words for _, words in fits],
        name or recipe[0].stem,
        time,
        nodes,
        gpus,
        tasks,
        cpus_per_task,
        mem,
        partition,
        account,
        constraint,
        save_before,
        setup,
        sbatch,
        dry_run,
        folder=fits[0][0],
    )[1]


def submit_fits(
    fits: Sequence[list[str]],
    name: str,
    time: str,
    nodes: int = 1,
    gpus: str = "1",
    tasks: int | None = None,
    cpus_per_task: int | None = None,
    mem: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    constraint: str | None = None,
    save_before: int = 120,
    setup: str = "",
    sbatch: str = "",
    dry_run: bool = False,
    folder: Path | None = None,
) -> tuple[str, str]:
    """Submit one fit as a job, or several as an array.

    Args:
        fits: Arguments behind ``equifeat fit`` of each.
        name: Name of the job.
        time: Time limit of one turn as in SLURM, such as 12:00:00 or 2-00.
        nodes: Number of nodes of a fit.
        gpus: GPUs of a node, such as 4 or a100:4; 0 trains on CPUs.
        tasks: Tasks of a node with --gpus 0; otherwise there is one a GPU.
        cpus_per_task: CPU cores of a task; without it, one more than the recipe's num_workers.
        mem: Memory of a node, such as 64G; without it, the cluster's default.
        partition: Partition of the cluster.
        account: Account that pays.
        constraint: Features that the nodes must have.
        save_before: Seconds before the time limit at which a fit saves and queues again.
        setup: Shell line that runs before the training, such as "module load cuda".
        sbatch: Further options of sbatch, as in "--qos=long --mail-type=END".
        dry_run: Give the batch script only.
        folder: Where SLURM's own files go, below it in slurm/; the first run's when left out.

    Returns:
        The job's number (empty for a dry run), and what to print.

    Raises:
        RecipeError: A recipe or an option is wrong.
        SubmitError: SLURM is not here, or refuses the job.
        ModelNameError: A recipe's backbone does not exist.
        MissingExtraError: submitit is not installed.
    """
    from equifeat.model.backbone import resolve_name

    if nodes < 1:
        raise RecipeError(f"--nodes is {nodes}: use at least 1")
    gpus, tasks = _tasks(gpus, tasks)
    minutes = parse_time(time)
    if save_before < 1 or minutes * 60 <= save_before + _CLOCK_SECONDS:
        raise RecipeError(
            f"--time {time} with --save-before {save_before} leaves no time to train: SLURM may "
            f"send the signal {_CLOCK_SECONDS} s early, so give a longer --time"
        )
    if mem is not None and not re.fullmatch(r"\d+[KMGT]?", mem):
        raise RecipeError(f"--mem is {mem!r}: write a number with K, M, G or T, such as 64G")
    more: dict[str, str | bool] = {
        key: value
        for key, value in {
            "partition": partition,
            "account": account,
            "constraint": constraint,
            "mem": mem,
        }.items()
        if value is not None
    }
    own = ["--trainer.num_nodes", str(nodes), "--trainer.devices", str(tasks)]
    if not gpus:
        own += ["--trainer.accelerator", "cpu"]
    runs: list[tuple[Path, list[str]]] = []
    cpus = 0
    for words in fits:
        config = parse_recipe([*words, *own])
        resolve_name(config["model"]["backbone"])
        cpus = max(cpus, config["data"]["num_workers"] + 1)
        runs.append((Path(config["run"]["dir"]), [*words, *own]))
    cpus = cpus if cpus_per_task is None else cpus_per_task
    if cpus < 1:
        raise RecipeError(f"--cpus-per-task is {cpus}: use at least 1")
    job = Job(
        name=name,
        nodes=nodes,
        gpus=gpus,
        tasks=tasks,
        cpus=cpus,
        minutes=minutes,
        save_before=save_before,
        setup=setup,
        more=more | _sbatch_options(sbatch),
    )
    executor = _executor((folder or runs[0][0]) / "slurm", job)
    if dry_run:
        return "", _script(executor, runs)
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise SubmitError(
                f"{program} is not on PATH: submit from a login node of a SLURM cluster, or see "
                "the batch script with --dry-run"
            )
    numbers, log = _submit(executor, runs)
    report = _report(job, numbers, [run for run, _ in runs], log, Path(config["data"]["views"]))
    return numbers[0].split("_")[0], report


def parse_time(text: str) -> int:
    """Read a time limit in any of SLURM's forms.

    Args:
        text: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Returns:
        Minutes, rounded up as SLURM does.

    Raises:
        RecipeError: Another form, or no time at all.
    """
    found = _TIME.fullmatch(text)
    seconds = 0
    if found:
        for part, value in found.groupdict(default="0").items():
            seconds += int(value) * _UNIT_SECONDS[part.rstrip("23")]
    if not seconds:
        raise RecipeError(
            f"--time is {text!r}: write it as SLURM does, such as 90 (minutes), 12:00:00 or 2-00 "
            "(days-hours)"
        )
    return -(-seconds // 60)


def parse_seeds(text: str) -> list[int]:
    """Read the seeds of an array.

    Args:
        text: Numbers and ranges, such as 0-4 or 0,7.

    Returns:
        The seeds, each once, in the order given.

    Raises:
        RecipeError: Anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise RecipeError(f"--array-seeds is {text!r}: write it such as 0-4 or 0,7")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return list(dict.fromkeys(seeds))


def parse_recipe(arguments: Sequence[str]) -> dict[str, Any]:
    """Read a recipe as ``equifeat fit`` would, without making anything of it.

    Args:
        arguments: Arguments behind ``equifeat fit``.

    Returns:
        Every key with its value.

    Raises:
        RecipeError: The recipe is missing or wrong.
    """
    from equifeat.data.datamodule import PairDataModule
    from equifeat.train.cli import RecipeCLI, RecipeParser, quiet
    from equifeat.train.module import EquivariantFinetune

    class Reader(RecipeCLI):
        """Stops when the recipe is read."""

        def _set_seed(self) -> None: ...
        def before_instantiate_classes(self) -> None: ...
        def instantiate_classes(self) -> None: ...
        def _run_subcommand(self, subcommand: str) -> None: ...

    with quiet(), ExitStack() as stack:
        try:
            reader = Reader(
                stack,
                model_class=EquivariantFinetune,
                datamodule_class=PairDataModule,
                args=["fit", *arguments],
                parser_class=RecipeParser,
                seed_everything_default=0,
            )
        except FileNotFoundError as error:
            raise RecipeError(f"{error.filename or error}: no such file") from error
    values: dict[str, Any] = reader.config["fit"].as_dict()
    return values


def fit_in_job(arguments: Sequence[str]) -> None:
    """Train in a task of a SLURM job; submitit calls this in every task of every turn.

    Args:
        arguments: Arguments behind ``equifeat fit``.

    Raises:
        SystemExit: The run failed, or was stopped by a signal (docs/resume.md).
    """
    from equifeat.train import cli

    # submitit's handlers would keep a job that is still starting from ending.
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    try:
        cli.main(["fit", *arguments])
    except EquifeatError as error:
        sys.stderr.write(f"equifeat: error: {error}\n")
        raise SystemExit(1) from error


def _tasks(gpus: str, tasks: int | None) -> tuple[str, int]:
    """GPUs and tasks of a node, checked."""
    found = re.fullmatch(r"(?:[A-Za-z][\w.-]*:)?(\d+)", gpus)
    if not found:
        raise RecipeError(f"--gpus is {gpus!r}: write the GPUs of a node, such as 4 or a100:4")
    count = int(found[1])
    if tasks is not None and (tasks < 1 or count not in (0, tasks)):
        raise RecipeError(
            f"--tasks is {tasks} with --gpus {gpus}: there is one task a GPU; --tasks is for "
            "--gpus 0, and at least 1"
        )
    return (gpus, count) if count else ("", tasks or 1)


def _words(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"{option} is {text!r}: {error}") from error


def _sbatch_options(text: str) -> dict[str, str | bool]:
    """Options by name, of those written as --name=value or --name."""
    options: dict[str, str | bool] = {}
    for word in _words("--sbatch", text):
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise RecipeError(f"--sbatch has {word!r}: write every option as --name=value")
        options[key] = value if equals else True
    return options


def _executor(folder: Path, job: Job) -> SlurmExecutor:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise MissingExtraError("submitit", "slurm", "submitting to SLURM") from error

    class Executor(submitit.SlurmExecutor):
        """Can be made where there is no SLURM, for --dry-run."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = Executor(folder=folder)
    executor.update_parameters(
        job_name=job.name,
        time=job.minutes,
        nodes=job.nodes,
        # One task a GPU. --gpus-per-task would hide the others' GPUs, and Lightning chooses its
        # GPU among all of the node by the task's local number.
        ntasks_per_node=job.tasks,
        **({"gpus_per_node": job.gpus} if job.gpus else {}),
        cpus_per_task=job.cpus,
        stderr_to_stdout=True,
        wckey=None,
        setup=[
            "export SUBMITIT_PREEMPT_SIGNAL=USR2",
            # srun no longer takes this from sbatch since SLURM 22.05.
            f"export SRUN_CPUS_PER_TASK={job.cpus}",
            *([job.setup] if job.setup else []),
        ],
        # A task that dies must not leave the others waiting for it until the time limit.
        srun_args=["--kill-on-bad-exit=1"],
        additional_parameters={
            # Not B: so that the tasks get it, not the batch shell.
            "signal": f"USR1@{job.save_before}",
            "requeue": True,
            **job.more,
        },
    )
    return executor


def _script(executor: SlurmExecutor, runs: Sequence[tuple[Path, list[str]]]) -> str:
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    notes = "".join(f"# runs: equifeat fit {shlex.join(words)}\n" for _, words in runs)
    return text + notes


def _submit(
    executor: SlurmExecutor, runs: Sequence[tuple[Path, list[str]]]
) -> tuple[list[str], Path]:
    """Submit one job or one array; leave nothing behind when SLURM refuses."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    before = set(executor.folder.glob("*")) if executor.folder.is_dir() else set()
    try:
        # submitit repeats sbatch's words there.
        with redirect_stderr(StringIO()):
            jobs = executor.map_array(fit_in_job, [words for _, words in runs])
    except (FailedJobError, FailedSubmissionError) as error:
        for path in set(executor.folder.glob("*")) - before:
            path.unlink()
        lines = re.findall(r"^sbatch: error: (.+)$", str(error), re.MULTILINE)
        why = "; ".join(lines or str(error).split("\n")[-1:]) or "no reason given"
        raise SubmitError(f"sbatch refused the job: {why}") from error
    return [job.job_id for job in jobs], jobs[0].paths.stdout


def _report(job: Job, numbers: Sequence[str], runs: Sequence[Path], log: Path, views: Path) -> str:
    number = numbers[0].split("_")[0]
    size = f"{job.nodes} {'node' if job.nodes == 1 else 'nodes'}, {job.tasks} "
    size += f"{'task' if job.tasks == 1 else 'tasks'} each"
    if job.gpus:
        size += f", GPUs of a node: {job.gpus}"
    array = f", array of {len(runs)} runs" if len(runs) > 1 else ""
    lines = [
        f"submitted job {number} ({size}{array}; {job.minutes} min a turn)",
        *(f"run folder  {run}" for run in runs),
        f"logs        {log.parent}: {log.name} is the first task's",
        f"stop        scancel {number}; the same command goes on from the last checkpoint",
    ]
    if not views.exists():
        lines.append(f"note: data.views is {views}, which does not exist on this machine")
    return "\n".join(lines)
