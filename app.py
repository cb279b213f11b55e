"""A page for the browser: a photo in; depth, metres, a view in 3D and files out.

    python app.py                                     # then open http://127.0.0.1:7860
    python app.py --ckpt runs/stage2/model.safetensors

Only this machine reaches it, unless another --host is given: 0.0.0.0 lets in everyone who reaches
the machine, without a password. Nothing is fetched from the network, by the page neither. Uploads
are kept in a temporary folder, until their visitor leaves or the program ends.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends it without a traceback while the rest is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import tempfile
import threading
from pathlib import Path

from data.images import allow_pixels
from engine import job
from engine.terminal import say
from extras import serve, visit


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (%(default)s, this machine)")
    add("--port", nargs="?", default="7860", help="its port (%(default)s)")
    add("--ckpt", type=Path, help="model (.safetensors), beside those in weights/")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    return parser.parse_args()


def main():
    args = options()
    serve.check_address(args.host, args.port)
    models = visit.find_models(args.ckpt)
    allow_pixels(visit.MOST_PIXELS)
    with tempfile.TemporaryDirectory(prefix="depth_page_", ignore_cleanup_errors=True) as folder:
        gr = serve.import_gradio(folder)
        desk = visit.Desk(Path(folder), models, job.start(args.device).device)
        name = next(iter(models))
        desk.model(name)
        blocks = serve.launch(gr, desk, args.host, int(args.port))
        if models[name] == visit.MINIATURE:
            say("No other model in weights/: predicting with the embedded miniature, a toy "
                "trained on procedural rooms.")
        say(f"Open http://{args.host}:{args.port} in a browser. Ctrl-C ends it.")
        try:
            threading.Event().wait()
        finally:
            blocks.close(verbose=False)


if __name__ == "__main__":
    job.run(main)
