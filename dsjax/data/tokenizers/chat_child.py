"""Renders chat templates in a process of its own, which chat_process.py starts; not to be imported.

    python -I -S chat_child.py FOLDER_WITH_JINJA2 CPU_SECONDS MEMORY_BYTES MOST_CHARACTERS

A request is a line of JSON on standard input, {"template": ..., "variables": ...}. Its answer is a line on standard
output, {"text": ...} or {"error": kind, "message": text}. Every request has an environment of its own. The process ends
with its input, which its parent's death closes. Only the standard library and jinja2 are loaded: a process that imports
nothing else starts in a tenth of a second.
"""

import json
import resource
import signal
import sys


def bound(memory_bytes: int) -> None:
    """Bound this process from now on: so much address space, no file of more than 0 bytes, no core dump."""
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    # Both are inherited from the parent, which may ignore or block the signal.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def make_environment():
    """Set up Jinja as transformers does for chat templates, in its sandbox."""
    import datetime

    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Strict(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):
            # Jinja gives an undefined value here, which prints as nothing: a template would go on as if it had been
            # allowed.
            raise SecurityError(f"{attribute!r} of {type(obj).__name__!r}")

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own escapes <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Dict:
        """`dict` of templates, which is no class here."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    environment = Strict(trim_blocks=True, lstrip_blocks=True, extensions=[make_generation(), loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": Dict(), "namespace": make_namespace()}
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def make_generation():
    """Make the extension of {% generation %}, which marks what the assistant says, for training; here it shows it."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller):
            return caller()

    return Generation


def make_namespace():
    """Make the `namespace` of templates, which takes no names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class CheckedNamespace(Namespace):
        def __init__(*args, **kwargs):  # as Jinja's own: `self` may be the name of an attribute
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                check_name(name)
            Namespace.__init__(args[0], attributes)

        def __setitem__(self, name, value):
            check_name(name)
            Namespace.__setitem__(self, name, value)

    def check_name(name):
        if str(name).startswith("_"):
            raise SecurityError(f"{name!r} of a namespace")

    return CheckedNamespace


def render(template: str, variables: dict, most_characters: int) -> dict[str, str]:
    """Render one request in a fresh environment."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
    from jinja2.exceptions import SecurityError

    pieces, length = [], 0
    try:
        for piece in make_environment().from_string(template).generate(variables):
            length += len(piece)
            if length > most_characters:
                return {"error": "output", "message": ""}
            pieces.append(piece)
    except TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"error": "security", "message": str(error)}
    except UndefinedError as error:
        return {"error": "undefined", "message": str(error)}
    except TemplateError as error:
        return {"error": "raised", "message": str(error)}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except RecursionError:
        return {"error": "depth", "message": ""}
    except Exception as error:  # whatever Python expression a template holds may fail in its own way
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"}
    return {"text": "".join(pieces)}


def answer_to(line: bytes, most_characters: int) -> bytes:
    """Answer one request."""
    try:
        request = json.loads(line)
        return json.dumps(render(request["template"], request["variables"], most_characters)).encode()
    except MemoryError:
        return b'{"error": "memory", "message": ""}'


def serve(cpu_seconds: float, most_characters: int) -> None:
    """Answer requests until there are no more."""
    answer_to(b'{"template": "", "variables": {}}', most_characters)  # loads jinja2, which is nobody's time
    while line := sys.stdin.buffer.readline():
        # When the time is up SIGPROF ends the process. RLIMIT_CPU would count the renderings before this one.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = answer_to(line, most_characters)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    bound(int(sys.argv[3]))
    sys.path.append(sys.argv[1])
    serve(float(sys.argv[2]), int(sys.argv[4]))
