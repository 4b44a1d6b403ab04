"""Values to dataclasses and back, against JSON, PyYAML and expectations written by hand."""

import dataclasses
import json
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from dsjax.config import load, schema, strict_yaml
from dsjax.config.load import ConfigError, decode, differences, from_dict
from dsjax.config.run import RunConfig
from dsjax.data.config import DataConfig, StdlibSource, TokensSource
from dsjax.mesh.config import MeshConfig
from dsjax.models.config import PretrainedConfig
from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.optimizers.kinds.lamb import LambConfig
from dsjax.setup.config import TrainConfig


def problems(function, *arguments, **options) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    assert str(caught.value).split("\n") == list(caught.value.problems)
    return caught.value.problems


# ---- YAML
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc :#-", max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(json_values)
def test_json_is_read_as_json(value):
    assert strict_yaml.parse_yaml(json.dumps(value), "x") == value


def test_scalars_are_yaml_1_2():
    text = (
        "[1e-4, 1.0e4, 6e5, 1., .5, on, off, yes, no, y, 10:20, 010, 0x10, 0o10, 2020-01-01, ~, null, 1_000, '1', <<]"
    )
    assert strict_yaml.parse_yaml(text, "x") == [
        1e-4, 1e4, 6e5, 1.0, 0.5, "on", "off", "yes", "no", "y", "10:20", 10, 16, 8, "2020-01-01", None, None, "1_000",
        "1", "<<",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x:3:1: the key 'a' is given twice"),
        ("a: &b [1]\nc: *b", "x:1:4: anchors and aliases are not allowed"),
        ("a: *b", "x:1:4: anchors and aliases are not allowed"),
        ("!!python/object/apply:os.system ['true']", "x:1:1: tags are not allowed"),
        ("a: !!float 3", "x:1:4: tags are not allowed"),
        ("1: a", "x:1:1: a key must be text"),
        ("? [a]\n: b", "x:1:3: a key must be text"),
        ("[" * 100_000, "x:1:33: nested over 32 deep"),
        ("a: [1", "x:1:6: "),
        ("a: 1\n---\nb: 1", "x:2:1: "),
        ("a: \x07", "x: not readable as YAML: "),
        ("9" * 5000, "x:1:1: Exceeds the limit"),
    ],
)
def test_what_yaml_is_refused(text, message):
    (problem,) = problems(strict_yaml.parse_yaml, text, "x")
    assert problem.startswith(message)


# ---- round trip
@dataclasses.dataclass(frozen=True)
class Words:
    """Nothing but text."""

    text: str


def configs() -> st.SearchStrategy[RunConfig]:
    """Configs with every field drawn: whatever __post_init__ allows without looking at a neighbour."""
    fixed = {
        "num_heads": st.just(1),
        "cpu_devices": st.just(0),
        "profile": st.sampled_from(["", "1:20"]),
        "steps": st.just(0),
        "segments": st.just(()),
        "glob": st.sampled_from(["*.txt", "**/*"]),
        "num_layers": st.integers(1, 5),
    }
    fixed_of = {
        "FixedLinear": {"steps": st.integers(1, 2**60), "quantum": st.just(1)},
        "FixedRoot": {"steps": st.integers(1, 2**60), "quantum": st.just(1)},
        "FixedDiscrete": {"difficulties": st.just((50, 60)), "until": st.integers(1, 99).map(lambda step: (step,))},
        "DifficultyConfig": {"min": st.integers(1, 50), "max": st.integers(60, 100)},
        "LengthConfig": {"min": st.integers(1, 50), "max": st.just(0) | st.integers(60, 2**60)},
        "RandomLTDConfig": {"steps": st.integers(1, 2**60), "quantum": st.just(16), "max_kept": st.just(0)},
    }

    def of(hint: object) -> st.SearchStrategy:
        if schema.sections(hint):
            return st.one_of(*(build(cls) for cls in schema.sections(hint)))
        simple = {
            int: st.integers(300, 2**60),
            float: st.floats(5e-324, 1, exclude_max=True) | st.just(1e-5),
            bool: st.booleans(),
            str: st.text(max_size=8)
            | st.sampled_from(["on", "1e5", "1:30", "~", "null", "0x1", "- a", "a: b", " a", ""]),
        }
        if isinstance(hint, type) and hint in simple:
            return simple[hint]
        if schema.is_union(hint):
            parts = hint.__args__  # type: ignore[attr-defined]
            return st.one_of(*(st.none() if part is type(None) else of(part) for part in parts))
        arguments = hint.__args__  # type: ignore[attr-defined]
        if hint.__origin__ is Literal:  # type: ignore[attr-defined]
            return st.sampled_from(arguments)
        return st.lists(of(arguments[0]), min_size=1, max_size=2).map(tuple)

    def build(cls: type) -> st.SearchStrategy:
        def attempt(**values: object) -> object:
            try:
                return cls(**values)
            except ValueError:
                reject()

        hints = schema.field_types(cls)
        given = fixed | fixed_of.get(cls.__name__, {})
        return st.builds(attempt, **{name: given[name] if name in given else of(hint) for name, hint in hints.items()})

    def segmented(config: RunConfig) -> RunConfig:
        layers = 3 if isinstance(config.model, PretrainedConfig) else config.model.num_layers
        model = dataclasses.replace(config.model, segments=(1,) * layers)
        return dataclasses.replace(config, model=model)

    whole = build(RunConfig)
    return whole | whole.map(segmented)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(configs())
def test_round_trip_through_any_yaml_reader(config):
    text = load.to_yaml(config)
    assert from_dict(RunConfig, yaml.safe_load(text)) == config
    strict = strict_yaml.parse_yaml(text, "x")
    assert isinstance(strict, dict) and from_dict(RunConfig, strict) == config
    assert from_dict(RunConfig, json.loads(json.dumps(load.to_dict(config)))) == config


BENT = [
    "\x85",
    "a\u2028b",
    "\r\n",
    "\t",
    "\0",
    "\ufeff",
    "é 漢 🙂",
    "0o7",
    "1_000",
    "=",
    "<<",
    "'",
    '"',
    " a ",
    "a #b",
    "",
]


@pytest.mark.parametrize("text", BENT)
def test_text_that_yaml_could_bend(text):
    written = load.to_yaml(Words(text=text))
    assert yaml.safe_load(written) == strict_yaml.parse_yaml(written, "x") == {"text": text}


def test_differences():
    a = RunConfig(train=TrainConfig(steps=10, clip_norm=1))
    b = RunConfig(train=TrainConfig(steps=10, clip_norm=1.0))
    assert a == b and differences(a, b) == []
    c = dataclasses.replace(a, seed=1, data=DataConfig(sources=(StdlibSource(), TokensSource(path="x"))))
    assert differences(a, c) == [
        ("seed", 0, 1),
        ("data.sources.1.kind", None, "tokens"),
        ("data.sources.1.path", None, "x"),
        ("data.sources.1.weight", None, 1.0),
    ]


# ---- types
def test_numbers():
    config = decode(TrainConfig, {"tokens": 1e9, "clip_norm": 1, "batch_size": 8.0}, origin="")
    assert (config.tokens, config.clip_norm, config.batch_size) == (10**9, 1.0, 8)
    assert [type(v) for v in (config.tokens, config.clip_norm, config.batch_size)] == [int, float, int]


@pytest.mark.parametrize("value", ["3", 3.5, True, None, [3], {"a": 3}, float("inf"), float("nan"), 1e300])
def test_not_a_whole_number(value):
    (problem,) = problems(decode, MeshConfig, {"data": value}, origin="m.yaml")
    assert problem.startswith("m.yaml: data: want a whole number; got ")


@pytest.mark.parametrize("value", ["3", True, None, [3], float("inf"), float("nan"), 10**400])
def test_not_a_number(value):
    (problem,) = problems(decode, TrainConfig, {"steps": 1, "clip_norm": value}, origin="")
    assert problem.startswith("clip_norm: want a number; got ")


def test_choices_compare_types_too():
    assert decode(MeshConfig, {"zero_stage": 1}, origin="").zero_stage == 1
    for value in (True, "1", 1.0, 4):
        (problem,) = problems(decode, MeshConfig, {"zero_stage": value}, origin="")
        assert problem.startswith("zero_stage: want one of 0, 1, 2, 3; got ")
    assert "closest: best_fit" in problems(decode, DataConfig, {"pack": "best-fit"}, origin="")[0]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Forms of fields that later rooms may want."""

    pair: tuple[int, float] = (1, 2.0)
    maybe: int | None = None
    either: int | Literal["auto"] = "auto"
    part: MeshConfig | None = None
    inner: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(fsdp=4))


def test_other_unions_and_tuples():
    given_ = {"pair": [3, 4], "maybe": 5, "either": 6, "part": {"data": 2}, "inner": {"tensor": 2}}
    assert decode(Shapes, given_, origin="") == Shapes(
        pair=(3, 4.0), maybe=5, either=6, part=MeshConfig(data=2), inner=MeshConfig(fsdp=4, tensor=2)
    )
    assert decode(Shapes, {"maybe": None, "either": "auto", "part": None}, origin="") == Shapes()
    found = problems(decode, Shapes, {"pair": [1], "maybe": "x", "either": "aut"}, origin="")
    assert found[0].startswith("pair: want a list, each item a whole number, a number (2 items); got a list of 1")
    assert found[1].startswith("maybe: want a whole number or null; got 'x'")
    assert found[2].startswith("either: want a whole number or one of auto; got 'aut'")


# ---- kinds
def test_kind_chooses_and_defaults():
    def optimizer(mapping):
        return from_dict(RunConfig, {"train": {"steps": 1}, "optimizer": mapping}).optimizer

    assert optimizer({}) == AdamWConfig()
    assert optimizer({"b2": 0.99}) == AdamWConfig(b2=0.99)
    assert optimizer({"kind": "lamb"}) == LambConfig()
    with pytest.raises(
        ConfigError, match=r"optimizer.kind: unknown kind; given 'adam' .*closest: adamw; allowed: adamw, l"
    ):
        optimizer({"kind": "adam"})
    with pytest.raises(ConfigError, match=r"optimizer.b2: unknown key for kind sgd; .*allowed: learning_rate"):
        optimizer({"kind": "sgd", "b2": 0.9})
    with pytest.raises(ConfigError, match=r"data.sources.0.kind: missing; allowed: stdlib, text"):
        from_dict(RunConfig, {"train": {"steps": 1}, "data": {"sources": [{"path": "x"}]}})
