"""Fifty tasks, eight seeds, TRQAM and fixed λ (QAM), on Ray. In the environment of trqam.py:

    pip install ray
    python .github/sweep_ray.py ROOT [--domains scene …] [--gpus 0.25 …] [flags of trqam.py]

One run of pretraining per domain and seed, ROOT/DOMAIN/pretrained/seedS, and after it one of
fine-tuning per task and method, ROOT/DOMAIN/METHOD/taskT/seedS; what a run prints lies beside it in
screen.txt. The same command again goes on where runs were stopped; finished ones return at once,
and a run that is still at work is left alone. Exit code 1 if one failed.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import ray

SCRIPT = Path(__file__).resolve().parent.with_name("trqam.py")
DOMAINS = "antmaze-large antmaze-giant humanoidmaze-medium humanoidmaze-large scene puzzle-3x3"
DOMAINS += " puzzle-4x4 cube-double cube-triple cube-quadruple"
METHODS = {"trqam": [], "qam": ["--fixed-lambda", "1"]}


@ray.remote
def run(folder: Path, flags: list, pretraining: int = 0) -> int:
    """A run of trqam.py after one of pretraining, which ended with a code; its own exit code."""
    if pretraining != 0:
        return pretraining
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPT), "--run-dir", str(folder), "--resume", *flags]
    with open(folder / "screen.txt", "a") as screen:
        return subprocess.run(command, stdout=screen, stderr=subprocess.STDOUT).returncode


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("root", type=Path)
    parser.add_argument("--domains", nargs="+", default=DOMAINS.split())
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--seeds", nargs="+", type=int, default=range(8))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--gpus", type=float, default=1, help="of a run; 0.25: four share one")
    parser.add_argument("--cpus", type=int, default=2, help="of a run, its threads")
    args, flags = parser.parse_known_args()

    ray.init()
    start = run.options(num_gpus=args.gpus, num_cpus=args.cpus).remote
    runs = {}
    for seed, domain in itertools.product(args.seeds, args.domains):
        common = ["--env", domain, "--seed", str(seed), *flags]
        base = args.root.resolve() / domain / "pretrained" / f"seed{seed}"
        cloned = start(base, [*common, "--offline-steps", "0", "--online-steps", "0"])
        runs[cloned] = base
        for task, method in itertools.product(args.tasks, args.methods):
            folder = args.root.resolve() / domain / method / f"task{task}" / f"seed{seed}"
            own = ["--task", str(task), "--pretrained", str(base / "checkpoint.pt")]
            own += ["--pretrain-steps", "0"]
            runs[start(folder, [*common, *own, *METHODS[method]], cloned)] = folder
    failed = 0
    waiting = list(runs)
    while waiting:
        (done,), waiting = ray.wait(waiting)
        code = ray.get(done)
        failed += code != 0
        print(f"{len(runs) - len(waiting)}/{len(runs)}  exit code {code}  {runs[done]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
