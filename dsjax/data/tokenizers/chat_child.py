"""Renders a chat template in a process of its own, which chat.py starts and bounds; not to be imported.

    python -I -S chat_child.py FOLDER_WITH_JINJA2 < request.json > answer.json

A request holds template, variables and the bounds; an answer is {"text": ...} or {"error": kind, "said": message}.
Only the standard library and jinja2 are loaded: a process that imports nothing else starts in a tenth of a second.
"""

import json
import resource
import sys


def bound(cpu_seconds: int, memory_bytes: int) -> None:
    """This process from now on: so much CPU time, so much address space, no file of more than 0 bytes, no core dump."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def make_environment():
    """Jinja as transformers sets it up for chat templates, in its sandbox."""
    import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Strict(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):
            # Jinja gives an undefined value here, which prints as nothing: a template would go on as if it had been
            # allowed.
            raise SecurityError(f"{attribute!r} of {type(obj).__name__!r}")

    class Generation(Extension):
        """{% generation %} marks what the assistant says, for training; here its content is just shown."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller):
            return caller()

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

    class CheckedNamespace(Namespace):
        """`namespace` of templates, without names that begin with an underscore."""

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

    environment = Strict(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": Dict(), "namespace": CheckedNamespace}
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def render(template: str, variables: dict, most_characters: int) -> dict[str, str]:
    """The answer to one request."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
    from jinja2.exceptions import SecurityError

    pieces, length = [], 0
    try:
        for piece in make_environment().from_string(template).generate(variables):
            length += len(piece)
            if length > most_characters:
                return {"error": "output", "said": ""}
            pieces.append(piece)
    except TemplateSyntaxError as error:
        return {"error": "syntax", "said": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"error": "security", "said": str(error)}
    except UndefinedError as error:
        return {"error": "undefined", "said": str(error)}
    except TemplateError as error:
        return {"error": "raised", "said": str(error)}
    except MemoryError:
        return {"error": "memory", "said": ""}
    except RecursionError:
        return {"error": "depth", "said": ""}
    except Exception as error:  # whatever Python expression a template holds may fail in its own way
        return {"error": "failed", "said": f"{type(error).__name__}: {error}"}
    return {"text": "".join(pieces)}


if __name__ == "__main__":
    request = json.load(sys.stdin.buffer)
    bound(request["cpu_seconds"], request["memory_bytes"])
    sys.path.append(sys.argv[1])
    answer = render(request["template"], request["variables"], request["most_characters"])
    sys.stdout.buffer.write(json.dumps(answer).encode())
