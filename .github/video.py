"""Show what a run of trqam.py learnt: the cloned and the fine-tuned flow, side by side.

    python .github/video.py runs/cube-single-play/seed0     writes video.gif there, of at most 1 MB
    python .github/video.py runs/cube-single-play/seed0 1   of one episode instead of three

Both play the same evaluation episodes; the one that ends first rests on its last picture.
Needs OpenGL: EGL on Linux, unless MUJOCO_GL says another. Pillow comes with OGBench.
"""

import copy
import io
import os
import sys
import warnings
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display; read by the next import
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trqam

LIMIT = 1_000_000  # bytes


def film(agent: trqam.Agent, env: trqam.gymnasium.Env, i: int) -> list:
    """Pictures of an evaluation episode: of every second step, and of the last."""
    steps = trqam.play(agent, env, trqam.FINAL, i)
    pictures = [Image.fromarray(env.render()) for n, _ in enumerate(steps) if n % 2 == 0]
    return [*pictures, Image.fromarray(env.render())]


def beside(left: Image.Image, right: Image.Image, size: int) -> Image.Image:
    """Two pictures side by side, each size x size under its caption."""
    bar = size // 8
    canvas = Image.new("RGB", (2 * size + 2, size + bar), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(0.6 * bar)
    for x, picture, caption in ((0, left, "cloned"), (size + 2, right, "fine-tuned by TRQAM")):
        canvas.paste(picture.resize((size, size)), (x, bar))
        draw.text((x + size // 2, bar // 2), caption, "black", font, anchor="mm")
    return canvas


def encode(pairs: list, size: int, skip: int) -> bytes:
    """The GIF, by every skip-th picture, in the colours of its first one."""
    frames = [beside(left, right, size) for left, right in pairs[::skip]]
    palette = frames[0].quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    options = {"save_all": True, "duration": 100 * skip, "loop": 0}
    frames[0].save(file, "GIF", append_images=frames[1:], **options)
    return file.getvalue()


def main(run_dir: str, episodes: int = 3) -> None:
    warnings.filterwarnings("ignore", module="gymnasium|glfw")
    fine_tuned = trqam.load_agent(Path(run_dir, "checkpoint.pt"))
    cloned = copy.deepcopy(fine_tuned)
    cloned.policy = fine_tuned.base
    env = trqam.make_env(fine_tuned.cfg.env, render_mode="rgb_array", width=240, height=240)
    pairs: list = []
    for i in range(episodes):
        left = film(cloned, env, i)
        right = film(fine_tuned, env, i)
        for n in range(max(len(left), len(right))):
            pairs.append((left[min(n, len(left) - 1)], right[min(n, len(right) - 1)]))
    for size, skip in ((240, 1), (200, 1), (240, 2), (200, 2), (160, 2), (120, 2), (120, 4)):
        gif = encode(pairs, size, skip)
        if len(gif) <= LIMIT:
            break
    else:
        sys.exit(f"expected a GIF of at most {LIMIT} bytes, got {len(gif)} at the smallest size")
    path = Path(run_dir, "video.gif")
    path.write_bytes(gif)
    print(f"{path}: {len(gif)} bytes, {2 * size} pixels wide, every picture of {skip}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"expected the folder of a run\n\n{__doc__}")
    main(sys.argv[1], *map(int, sys.argv[2:]))
