"""Turn a flow that TRQAM's authors pretrained into a checkpoint.pt for trqam.py's --pretrained.

    python .github/from_authors.py params.pkl flow.pt --env scene --scale paper

With flags it goes on as `python trqam.py --pretrained flow.pt` with these flags. The flows are at
Hugging Face, yonghoon96/trqam-bc-checkpoints; read without jax. Nothing of the file is run: a
pickle's NumPy objects become stubs, since a crafted dtype makes NumPy itself take bytes of the file
for pointers. Exit code 1 if the file is none of them, 2 for a wrong call.
"""

import pickle
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trqam

NAMES = {
    "Dense kernel": "weights",
    "Dense bias": "biases",
    "LayerNorm scale": "scales",
    "LayerNorm bias": "offsets",
}


class Stub:
    """Stands for a NumPy object of a pickle: keeps arguments and state, and runs nothing."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def tensor(self) -> torch.Tensor:
        """The array that it stands for."""
        if len(self.arguments) == 4:  # pickle protocol 5
            data, dtype, shape, order = self.arguments
        else:
            _, shape, dtype, fortran, data = self.state
            order = "F" if fortran else "C"
        kind = dtype.state[1] + dtype.arguments[0]  # such as "<f4"
        return torch.tensor(np.frombuffer(data, kind).reshape(shape, order=order))


class ArraysOnly(pickle.Unpickler):
    """Reads arrays in containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = r"numpy(\._?core\.\w+)? (_reconstruct|_frombuffer|ndarray|dtype|scalar)"
        if not re.fullmatch(arrays, f"{module} {name}"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return Stub


def read(path: str) -> tuple[trqam.Agent, dict]:
    """An agent that has the flow, and has learnt nothing else, and its sizes. Raises OSError.

    How long its chunks are the file doesn't tell: they are one large action.
    """
    try:
        with open(path, "rb") as file:
            network = ArraysOnly(file).load()["agent"]["network"]["params"]
        layers = network["modules_actor_slow"]
        flow = {}
        for layer, arrays in layers.get("mlp", layers).items():
            kind, i = layer.split("_")
            for name, array in arrays.items():
                ours = NAMES[f"{kind} {name}"]
                flow[f"base.{ours}.{i}"] = array.tensor()
        sizes = {
            "width": len(flow["base.biases.0"]),
            "layers": sum(name.startswith("base.biases") for name in flow) - 1,
            "flow_layer_norm": "base.scales.0" in flow,
        }
        cfg = trqam.Config(**sizes, chunk=1, critics=1, pretrain_steps=0, device="cpu")
        D = len(flow[f"base.biases.{cfg.layers}"])
        agent = trqam.Agent(cfg, len(flow["base.weights.0"]) - D - 1, D)
        agent.load_state_dict(agent.state_dict() | flow)
        agent.start_fine_tuning()
    except OSError:
        raise
    except Exception as error:  # of damaged and of hostile files, many kinds
        raise OSError(f"expected a flow of TRQAM's authors, got {path}: {error!r}") from error
    return agent, sizes


def main(source: str, target: str) -> None:
    """Write the agent's checkpoint."""
    agent, sizes = read(source)
    content = {
        "format": trqam.FORMAT,
        "config": asdict(agent.cfg),
        "dims": agent.dims,
        "data": None,
        "agent": agent.state_dict(),
        "progress": vars(trqam.Progress()),
    }
    with open(target, "wb") as file:
        torch.save(content, file)
    print(f"{target}: {sizes}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        print(f"expected two files, then flags\n\n{__doc__}", file=sys.stderr)
        sys.exit(2)
    source, target, *flags = sys.argv[1:]
    try:
        main(source, target)
    except OSError as error:
        sys.exit(str(error))
    if flags:
        sys.argv = [trqam.__file__, "--pretrained", target, *flags]
        sys.exit(trqam.main())
