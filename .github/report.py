"""The paper's Table 1 from the runs of trqam.py below a folder: success in %, domains × methods.

    python .github/report.py runs                        the table, and what it lacks
    python .github/report.py runs --tasks --csv all.csv  every task and run too; as CSV
    python .github/report.py runs --figure curves.png    success and path KL (needs matplotlib)

Reads config.json, eval.csv and train.csv; of a run counts the evaluation that ends its last phase.
A cell is, as in the paper, the mean over tasks and seeds ± the sample standard deviation over seeds
of their means over the tasks, for which a seed must have them all (else ± ?). Of a single run it is
[Wilson's 95 % interval] for its episodes. QAM is λ fixed at 1. The figure has a thin line per seed.
"""

import argparse
import csv
import importlib.util
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

PAPER = {  # offline, 1M updates, 8 seeds, 5 tasks
    "antmaze-large": {"TRQAM": (89, 4), "QAM": (62, 9)},
    "antmaze-giant": {"TRQAM": (41, 4), "QAM": (29, 4)},
    "humanoidmaze-medium": {"TRQAM": (84, 3), "QAM": (64, 7)},
    "humanoidmaze-large": {"TRQAM": (36, 4), "QAM": (4, 3)},
    "scene": {"TRQAM": (79, 1), "QAM": (64, 4)},
    "puzzle-3x3": {"TRQAM": (100, 0), "QAM": (15, 3)},
    "puzzle-4x4": {"TRQAM": (99, 1), "QAM": (1, 1)},
    "cube-double": {"TRQAM": (81, 3), "QAM": (71, 2)},
    "cube-triple": {"TRQAM": (50, 5), "QAM": (19, 6)},
    "cube-quadruple": {"TRQAM": (19, 5), "QAM": (18, 3)},
}
ORDER = [*PAPER, "pretrained", "TRQAM", "QAM"]  # of domains and methods; others follow by name
DEFAULT_TASK = {"maze": 1, "soccer": 4, "cube": 2, "scene": 2, "puzzle-4x[56]": 2, "puzzle": 4}
# settings in which the runs of a cell may differ
OWN = {"env", "task", "seed", "kl_budget", "run_dir", "resume", "pretrained", "device", "workers"}
OWN |= {"log_interval", "eval_interval", "eval_episodes", "dataset_dir", "dataset_url"}
OWN |= {"data_used", "versions", "torch_build", "threads", "command", "save_minutes"}
COLUMNS = "level domain method task seed success std low high pretrained paper paper_std runs"
COLUMNS += " episodes path_kl kl_budget missing folder"
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error)  # what is raised


@dataclass
class Run:
    """A finished run; its curves are {thousands of updates after pretraining: value}."""

    folder: Path
    config: dict
    domain: str
    method: str
    task: int
    seed: int
    budget: float | None  # of TRQAM
    success: float
    episodes: int
    curves: dict

    @property
    def kl(self) -> float | None:
        """Mean path KL over the last third of the updates."""
        curve = self.curves["path_kl"]
        return mean(y for x, y in curve.items() if x > max(curve) * 2 / 3) if curve else None


def read_rows(path: Path, *names: str) -> list[list]:
    """The named columns of a CSV file, None where empty. Raises DAMAGED."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if any(None in row or None in row.values() for row in rows):
        raise ValueError("a row is cut")
    return [[float(row[name]) if row[name] else None for name in names] for row in rows]


def method_of(config: dict) -> str:
    if config["offline_steps"] + config["online_steps"] == 0:
        return "pretrained"
    lam = config["fixed_lambda"]
    name = "TRQAM" if lam is None else "QAM" if lam == 1 else f"λ={lam:g}"
    return name + " frozen base" * config["frozen_base"] + " online" * (config["online_steps"] > 0)


def read_run(folder: Path, notes: list) -> Run:
    """A run from its files. Raises DAMAGED, or EOFError where it is unfinished."""
    config = json.loads((folder / "config.json").read_text())
    data, _, task = config["env"].removesuffix("-v0").partition("-singletask")
    domain = re.sub("-(play|navigate)$", "", data)
    default = next((n for name, n in DEFAULT_TASK.items() if re.search(name, domain)), None)
    start = config["pretrain_steps"]
    end = start + config["offline_steps"] + config["online_steps"]
    rows = []
    if (folder / "eval.csv").exists():
        rows = read_rows(folder / "eval.csv", "step", "success", "episodes", "final")
    step, success, episodes, final = rows[-1] if rows else (0, 0, 0, 0)
    if step < end or not final:
        raise EOFError(f"evaluated at step {step:.0f} of {end}")
    if not 0 <= success <= 1 or episodes < 1:
        raise ValueError(f"success {success} of {episodes} episodes")
    points = {(x - start) / 1000: 100 * y for x, y, *_ in rows if x >= start}
    curves = {"success": points, "path_kl": {}}
    if end > start:
        try:
            rows = read_rows(folder / "train.csv", "step", "path_kl")
            curves["path_kl"] = {(x - start) / 1000: y for x, y in rows if y is not None}
        except DAMAGED as error:
            notes.append(f"{folder}: its KL is left out, train.csv is damaged: {error!r}")
    method = method_of(config)
    which = (domain, method, int(task.removeprefix("-task") or default), int(config["seed"]))
    budget = float(config["kl_budget"]) if "TRQAM" in method else None
    return Run(folder, config, *which, budget, success, int(episodes), curves)


def read_runs(top: Path, notes: list) -> list[Run]:
    """The finished runs below a folder; what is not counted is noted."""
    files = ("config.json", "eval.csv", "train.csv", "checkpoint.pt")
    runs: dict = {}
    for folder in sorted({path.parent for name in files for path in top.rglob(name)}):
        try:
            run = read_run(folder, notes)
        except EOFError as error:
            notes.append(f"{folder}: not counted, unfinished: {error}")
        except DAMAGED as error:
            notes.append(f"{folder}: not counted, damaged: {error!r}")
        else:
            key = (run.domain, run.method, run.task, run.seed, run.budget)
            other = runs.setdefault(key, run)
            if other is not run:
                notes.append(f"{folder}: not counted, another {other.folder}")
    for cell in {key[:2] for key in runs}:  # the budget of most runs goes without saying
        keys = [key for key in runs if key[:2] == cell]
        (usual, n), *others = Counter(budget for *_, budget in keys).most_common()
        for key in keys:
            if key[-1] != usual or (others and others[0][1] == n):
                runs[key].method += f" ε={key[-1]:g}"
    return list(runs.values())


def place(names: tuple) -> list:
    return [(ORDER.index(name) if name in ORDER else len(ORDER), name) for name in names]


def wilson(p: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a success rate by n episodes."""
    z = 1.959964
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def summary(level: str, runs: list[Run], **more: object) -> dict:
    """A line of the CSV: a domain, a task or a run, numbers in %."""
    tasks = {run.task for run in runs}
    seeds = {run.seed for run in runs}
    at = {(run.task, run.seed): 100 * run.success for run in runs}
    of_tasks = [mean(at[t, s] for s in seeds if (t, s) in at) for t in tasks]
    whole = [mean(at[t, s] for t in tasks) for s in seeds if all((t, s) in at for t in tasks)]
    before = [run.curves["success"][0] for run in runs if 0 in run.curves["success"]]
    kls = [run.kl for run in runs if run.kl is not None]
    line = {"level": level, "domain": runs[0].domain, "method": runs[0].method, **more}
    line |= {
        "success": mean(of_tasks),
        "runs": len(runs),
        "episodes": sum(r.episodes for r in runs),
    }
    line |= {"pretrained": mean(before)} if before else {}
    line |= {"std": stdev(whole)} if len(whole) > 1 else {}
    line |= {"path_kl": mean(kls), "kl_budget": runs[0].budget} if kls else {}
    if len(runs) == 1:
        low, high = wilson(runs[0].success, runs[0].episodes)
        line |= {"low": 100 * low, "high": 100 * high, "seed": runs[0].seed}
    return line


def missing(cell: list[Run], tasks: set, seeds: set) -> str:
    """Seeds and tasks that a cell has no run of: whole ones first, then the other pairs."""
    lacking = set(product(tasks, seeds)) - {(run.task, run.seed) for run in cell}
    wholes = {f"seed {s}": {(t, s) for t in tasks} for s in sorted(seeds)}
    wholes |= {f"task {t}": {(t, s) for s in seeds} for t in sorted(tasks)}
    texts = [name for name, pairs in wholes.items() if pairs <= lacking]
    rest = lacking.difference(*(wholes[name] for name in texts))
    return ", ".join(texts + [f"task {t} of seed {s}" for t, s in sorted(rest)])


def summarize(runs: list[Run], seeds: set, notes: list) -> list[dict]:
    """Lines of domains, of their tasks, and of the runs of those; notes what they lack."""
    lines = []
    found = {(run.domain, run.method) for run in runs}
    both = {method for _, method in found} & PAPER["scene"].keys()  # expected in every domain
    for domain, method in sorted(found | {(d, m) for d, _ in found for m in both}, key=place):
        cell = [run for run in runs if (run.domain, run.method) == (domain, method)]
        if not cell:
            notes.append(f"{domain} {method}: no finished run")
            continue
        tasks = {run.task for run in runs if run.domain == domain and run.method != "pretrained"}
        if method == "pretrained":  # one flow for all tasks
            tasks = {run.task for run in cell}
        lacking = missing(cell, tasks, seeds)
        if lacking:
            notes.append(f"{domain} {method}: {lacking} missing")
        differ = {n for n in cell[0].config if len({str(r.config.get(n)) for r in cell}) > 1} - OWN
        if differ:
            notes.append(f"{domain} {method}: runs of different {', '.join(sorted(differ))}")
        paper = PAPER.get(domain, {}).get(method, ("", ""))
        more = {"missing": lacking, "paper": paper[0], "paper_std": paper[1]}
        lines.append(summary("domain", cell, **more))
        for task in sorted({run.task for run in cell}):
            own = sorted((run for run in cell if run.task == task), key=lambda run: run.seed)
            lines.append(summary("task", own, task=task))
            lines += [summary("run", [run], task=task, folder=run.folder) for run in own]
    absent = [domain for domain in PAPER if domain not in {run.domain for run in runs}]
    if absent:
        notes.append(f"no finished run of the paper's {', '.join(absent)}")
    return lines


def written(line: dict | None) -> str:
    """43 ± 7 of several seeds, 43 [30, 57] of a run, – of none."""
    if not line:
        return "–"
    text = f"{line['success']:.0f}"
    if "low" in line:
        return f"{text} [{line['low']:.0f}, {line['high']:.0f}]"
    return f"{text} ± {line['std']:.0f}" if "std" in line else f"{text} ± ?"


def print_columns(columns: list[list]) -> None:
    texts = [[str(value) for value in column] for column in columns]
    widths = [max(map(len, column)) for column in texts]
    for row in zip(*texts, strict=True):
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print()


def print_table(lines: list[dict]) -> None:
    """Domains × methods with the paper's numbers, and the means over those of the paper."""
    cells = {(line["domain"], line["method"]): line for line in lines if line["level"] == "domain"}
    domains = list(dict.fromkeys(domain for domain, _ in cells))
    columns = [["domain", *domains, "mean of the paper's"]]
    for method in sorted({method for _, method in cells}, key=lambda name: place((name,))):
        own = [cells[d, method] for d in PAPER if (d, method) in cells]
        text = f"{mean(c['success'] for c in own):.0f} ({len(own)} of {len(PAPER)})" if own else "–"
        columns.append([method, *(written(cells.get((d, method))) for d in domains), text])
        if method in PAPER["scene"]:
            papers = ["{} ± {}".format(*PAPER[d][method]) if d in PAPER else "–" for d in domains]
            text = f"{mean(c['paper'] for c in own):.0f}" if own else "–"
            columns.append(["(paper)", *papers, text])
    print_columns(columns)


def print_tasks(lines: list[dict]) -> None:
    """Every task and run, with success before fine-tuning and the KL of its last third."""
    names = ["domain", "method", "task", "seed"]
    rows = [[*names, "before", "success", "episodes", "path KL"]]
    for line in lines:
        if line["level"] == "run" or (line["level"] == "task" and line["runs"] > 1):
            before = f"{line['pretrained']:.0f}" if "pretrained" in line else "–"
            kl = f"{line['path_kl']:.3f}" if "path_kl" in line else "–"
            kl += f" of {line['kl_budget']:g}" if line.get("kl_budget") else ""
            own = [line.get(name, "all") for name in names]
            rows.append([*own, before, written(line), line["episodes"], kl])
    print_columns([list(column) for column in zip(*rows, strict=True)])


def average(curves: list[dict]) -> dict:
    """The mean of curves where all of them have a point."""
    return {x: mean(c[x] for c in curves) for x in curves[0] if all(x in c for c in curves)}


def draw(runs: list[Run], path: Path) -> None:
    """A column per domain: success and path KL, a thin line per seed, a thick one their mean."""
    import matplotlib.pyplot as plt

    domains = sorted({(run.domain,) for run in runs}, key=place)
    methods = sorted({(run.method,) for run in runs} - {("pretrained",)}, key=place)
    titles = {"success": "success, %", "path_kl": "path KL, nats per action"}
    size = (1 + 3.4 * len(domains), 5.6)
    figure, axes = plt.subplots(2, len(domains), figsize=size, layout="constrained", squeeze=False)
    panels = zip(axes.flat, product(titles, domains), strict=True)
    for ax, (name, (domain,)) in panels:
        for color, (method,) in enumerate(methods):
            cell = [run for run in runs if (run.domain, run.method) == (domain, method)]
            seeds = {run.seed for run in cell}
            curves = [average([r.curves[name] for r in cell if r.seed == s]) for s in seeds]
            for curve in curves:
                ax.plot(list(curve), list(curve.values()), color=f"C{color}", linewidth=0.7)
            curve = average(curves) if curves else {}
            ax.plot(list(curve), list(curve.values()), f"C{color}", linewidth=2.2, label=method)
            if name == "path_kl" and cell and cell[0].budget:
                ax.axhline(cell[0].budget, color=f"C{color}", linestyle="--")
        ax.set(title=domain, xlabel="updates, thousands", ylabel=titles[name])
        ax.set_ylim(0, 104 if name == "success" else None)
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> int:
    """Exit codes: 0 done, 1 nothing to report or no place for it, 2 a wrong call."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="of runs, however deep they lie")
    parser.add_argument("--tasks", action="store_true", help="print every task and run too")
    parser.add_argument("--seeds", type=int, default=0, help="expect seeds 0 to N−1; else as found")
    parser.add_argument("--csv", type=Path, help="file for domains, tasks and runs")
    parser.add_argument("--figure", type=Path, help="file for the curves, needs matplotlib")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"expected a folder, got {args.folder}")
    if args.figure and not importlib.util.find_spec("matplotlib"):
        parser.error("expected matplotlib for --figure, got none: pip install matplotlib")

    notes: list[str] = []
    runs = read_runs(args.folder, notes)
    try:
        if not runs:
            raise ValueError(
                "\n".join([f"expected finished runs in {args.folder}, got none", *notes])
            )
        lines = summarize(runs, {run.seed for run in runs} | set(range(args.seeds)), notes)
        print_table(lines)
        if args.tasks:
            print_tasks(lines)
        print(*notes, sep="\n")
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS.split())
                writer.writeheader()
                writer.writerows(lines)
        if args.figure:
            draw(runs, args.figure)
    except (OSError, ValueError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
