"""Show what a run of trqam.py learnt: the pretrained and the fine-tuned flow, side by side.

    pip install pillow
    python .github/video.py runs/cube-single-play/seed0     writes video.gif there, of at most 1 MB

Both play the same three evaluation episodes; the one that ends first rests on its last picture.
Needs OpenGL: EGL on Linux, unless MUJOCO_GL says another.
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


def film(agent: trqam.Agent, episodes: int) -> list:
    """A picture of every second step of the first evaluation episodes."""
    env = trqam.make_env(agent.cfg.env, render_mode="rgb_array", width=240, height=240)
    pictures = []
    for i in range(episodes):
        for n, _ in enumerate(trqam.play(agent, env, trqam.FINAL, i)):
            if n % 2 == 0:
                pictures.append(Image.fromarray(env.render()))
    return pictures


def beside(left: Image.Image, right: Image.Image, size: int) -> Image.Image:
    """Two pictures side by side, each size x size under its caption."""
    bar = size // 8
    canvas = Image.new("RGB", (2 * size + 2, size + bar), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(0.6 * bar)
    for x, picture, caption in ((0, left, "pretrained"), (size + 2, right, "fine-tuned by TRQAM")):
        canvas.paste(picture.resize((size, size)), (x, bar))
        draw.text((x + size // 2, bar // 2), caption, "black", font, anchor="mm")
    return canvas


def encode(left: list, right: list, size: int, skip: int) -> bytes:
    """The GIF, by every skip-th picture, in the colours of its first one."""
    length = max(len(left), len(right))
    frames = [
        beside(left[min(n, len(left) - 1)], right[min(n, len(right) - 1)], size)
        for n in range(0, length, skip)
    ]
    palette = frames[0].quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    options = {"save_all": True, "duration": 100 * skip, "loop": 0}
    frames[0].save(file, "GIF", append_images=frames[1:], **options)
    return file.getvalue()


def main(run_dir: str) -> None:
    warnings.filterwarnings("ignore", module="gymnasium|glfw")
    fine_tuned = trqam.load_agent(Path(run_dir, "checkpoint.pt"))
    pretrained = copy.deepcopy(fine_tuned)
    pretrained.policy = fine_tuned.base
    left = film(pretrained, 3)
    right = film(fine_tuned, 3)
    for size, skip in ((240, 1), (200, 1), (240, 2), (200, 2), (160, 2), (120, 2), (120, 4)):
        gif = encode(left, right, size, skip)
        if len(gif) <= LIMIT:
            break
    path = Path(run_dir, "video.gif")
    path.write_bytes(gif)
    print(f"{path}: {len(gif)} bytes, {2 * size} pixels wide, every picture of {skip}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"expected the folder of a run\n\n{__doc__}")
    main(sys.argv[1])
