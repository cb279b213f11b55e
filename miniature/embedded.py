"""What the scripts fall back to when they are called with neither weights nor data.

The small models in weights/, and scenes that are rendered into miniature/scenes when first needed.
"""

from pathlib import Path

from data.files import write_png
from data.hypersim import Hypersim
from engine import job, terminal
from engine.terminal import say
from miniature import render

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
SD2 = WEIGHTS / "miniature_sd2.safetensors"
DINOV2 = WEIGHTS / "miniature_dinov2.safetensors"
TRAINED = WEIGHTS / "miniature.safetensors"
SCENES = Path(__file__).resolve().parent / "scenes"
FRAMES = dict(train=960, val=48, streets_train=50, streets_val=8)

# A run of minutes on two cores in place of the paper's days.
STAGE1 = dict(steps=590, batch=16, micro_batch=8, lr=1.4e-3, warmup=30, decay_steps=850,
              cache=Path(__file__).resolve().parent / "cache",
              validate_every=590, save_every=295)
STAGE2 = dict(steps=60, batch=8, micro_batch=4, lr=1e-4, warmup=10, decay_steps=60,
              validate_every=60, save_every=30)
DISTILL = dict(width=16, blocks=2, steps=600, batch=8, micro_batch=8, warmup=30, decay_steps=600,
               cache=STAGE1["cache"], validate_every=600, save_every=300)


def stand_in(parser):
    """The options of a trainer that was given no data: these scenes, small weights, minutes."""
    say(f"No --data: training on the embedded scenes in {SCENES}.")
    args = parser.parse_args()
    name, minutes = ("sd2", STAGE1) if "sd2" in args else ("ckpt", STAGE2)
    weights = SD2
    if "part" in args:
        minutes, weights = DISTILL, TRAINED
    defaults = dict(data=SCENES / "hypersim", vkitti=SCENES / "vkitti", vkitti_crop=(96, 336))
    given = getattr(args, name) is not parser.get_default(name)
    if not given:
        say(f"No --{name}: starting from the embedded miniature, {weights.name}.")
        defaults[name] = weights
    if not given or name == "ckpt":
        defaults |= minutes
    if terminal.is_first():
        render.ensure(SCENES, **FRAMES)
    job.wait()
    parser.set_defaults(**defaults)
    return parser.parse_args()


def held_out():
    """Renders the held-out scenes, said; the folder that holds hypersim/."""
    say(f"No --data: the miniature's held-out scenes in {SCENES}.")
    if terminal.is_first():
        render.ensure(SCENES, val=FRAMES["val"])
    job.wait()
    return SCENES


def pictures():
    """A folder with four pictures of held-out scenes."""
    reader = Hypersim(held_out() / "hypersim", "val")
    folder = SCENES / "pictures"
    folder.mkdir(exist_ok=True)
    for number in range(4):
        image = reader[number * len(reader) // 4]["image"]
        write_png(folder / f"room_{number}.png", image.permute(1, 2, 0).numpy())
    return folder
