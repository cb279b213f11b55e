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
import os
import socket
import tempfile
import threading
from pathlib import Path

from data.images import allow_pixels
from engine import job
from engine.terminal import say
from extras import page, visit

PORTS = range(1, 65536)
WAITING = 40  # actions of all visitors that wait; more are refused
# The browser itself refuses what is not from here.
POLICY = ("default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; "
          "form-action 'self'; frame-ancestors 'self'")


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (%(default)s, this machine)")
    add("--port", nargs="?", default="7860", help="its port (%(default)s)")
    add("--ckpt", type=Path, help="model (.safetensors), beside those in weights/")
    add("--device", default="auto", help="cuda, mps or cpu (auto)")
    return parser.parse_args()


def check_address(host, port):
    """ValueError unless one can listen there."""
    if not (port or "").isdecimal() or int(port) not in PORTS:
        raise ValueError(f"--port must be a number from 1 to {PORTS[-1]}, such as 7860.")
    try:
        family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host} --port {port} can't be used "
                         f"({getattr(error, 'strerror', None) or error}): choose another "
                         "port.") from error


def import_gradio(folder):
    """The module gradio, told to keep its files in a folder and to report nothing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise ValueError("app.py needs gradio: pip install -r extras/requirements.txt") from error
    return gradio


class Guarded:
    """The server's ASGI application with a limit for requests and a policy for the browser."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        headers = dict(scope.get("headers", ()))
        length = headers.get(b"content-length", b"0")
        too_long = not length.isdigit() or int(length) > visit.MOST_BYTES + (1 << 20)
        if scope["type"] == "http" and (too_long or b"transfer-encoding" in headers):
            text = f"A request may have at most {visit.MOST_BYTES >> 20} MB.".encode()
            await send({"type": "http.response.start", "status": 413,
                        "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": text})

        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()),
                                      (b"content-security-policy", POLICY.encode())]
            await send(message)
        await self.app(scope, receive, with_policy)


def launch(gr, desk, host, port):
    """Starts the server in the background -> gradio's Blocks, to be closed."""
    blocks = page.build(gr, desk)
    blocks.queue(max_size=WAITING, default_concurrency_limit=1)
    blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
        ssr_mode=False, footer_links=[], run_history=False, enable_monitoring=False,
        max_file_size=visit.MOST_BYTES, css=page.CSS, js=page.CURSOR,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        app_kwargs={"middleware": [(Guarded, (), {})]})
    return blocks


def main():
    args = options()
    check_address(args.host, args.port)
    models = visit.find_models(args.ckpt)
    allow_pixels(visit.MOST_PIXELS)
    with tempfile.TemporaryDirectory(prefix="depth_page_", ignore_cleanup_errors=True) as folder:
        gr = import_gradio(folder)
        desk = visit.Desk(Path(folder), models, job.start(args.device).device)
        name = next(iter(models))
        desk.model(name)
        blocks = launch(gr, desk, args.host, int(args.port))
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
