"""The engine over HTTP, with OpenAI's names: requests in, answers and streams of events out. Needs the extra `serve`.

`make_app` gives a Starlette application. `serve` runs it on a socket until a signal ends it, in order, which another
ASGI server does by its own rules.
"""

from .app import make_app
from .main import Listen, serve
from .options import ServerOptions

__all__ = ["Listen", "ServerOptions", "make_app", "serve"]
