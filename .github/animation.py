"""Put the videos of two runs side by side, with captions, into one GIF of at most 1 MB.

    python trqam.py --run-dir runs/before --offline-steps 0 --video    the pretrained policy
    cp -r runs/before runs/after
    python trqam.py --run-dir runs/after --resume --offline-steps 8000 --video
    python .github/animation.py runs/before/video.gif runs/after/video.gif    writes .github/arm.gif

Both play the same episodes; the shorter video rests on its last picture. Pillow comes with imageio,
which trqam.py needs.
"""

import io
import sys
from itertools import zip_longest
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTIONS = ("pretrained", "fine-tuned by TRQAM")
FRAMES = 100  # at most, of each video, of 10 a second
LIMIT = 1_000_000  # bytes


def picture(left: np.ndarray, right: np.ndarray, size: int) -> Image.Image:
    """Two pictures side by side, each size x size under its caption."""
    bar = size // 8
    canvas = Image.new("RGB", (2 * size + 2, size + bar), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(0.6 * bar)
    for i, pixels in enumerate((left, right)):
        x = i * (size + 2)
        canvas.paste(Image.fromarray(pixels).resize((size, size)), (x, bar))
        draw.text((x + size // 2, bar // 2), CAPTIONS[i], "black", font, anchor="mm")
    return canvas


def encode(videos: list, size: int, skip: int) -> bytes:
    """The GIF, by every skip-th picture, in the colours of its first one."""
    frames = []
    last = [video[-1] for video in videos]
    for pair in list(zip_longest(*videos))[::skip]:
        left, right = (end if now is None else now for now, end in zip(pair, last, strict=True))
        frames.append(picture(left, right, size))
    palette = frames[0].quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    options = {"save_all": True, "duration": 100 * skip, "loop": 0}
    frames[0].save(file, "GIF", append_images=frames[1:], **options)
    return file.getvalue()


def main(before: str, after: str) -> None:
    videos = [iio.imread(path, mode="RGB")[:FRAMES] for path in (before, after)]
    choices = ((240, 1), (200, 1), (240, 2), (200, 2), (160, 2), (120, 2), (120, 4))
    for size, skip in choices:
        gif = encode(videos, size, skip)
        if len(gif) <= LIMIT:
            break
    else:
        sys.exit(f"expected at most {LIMIT} bytes, got {len(gif)}; take fewer than {FRAMES} FRAMES")
    path = Path(__file__).with_name("arm.gif")
    path.write_bytes(gif)
    print(f"{path}: {len(gif)} bytes, {2 * size} pixels wide, every picture of {skip}")


if __name__ == "__main__":
    main(*sys.argv[1:])
