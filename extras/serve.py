"""The web server of app.py: its address, gradio, what it refuses, what a browser may load."""

import os
import socket

from extras import page, visit

PORTS = range(1, 65536)
WAITING = 40  # actions of all visitors that wait; more are refused
# The browser itself refuses what is not from here.
POLICY = ("default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; "
          "form-action 'self'; frame-ancestors 'self'")


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
