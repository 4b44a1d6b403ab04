"""Files and --set to a RunConfig; whatever they hold, the answer is a RunConfig or a ConfigError."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsjax.config import load, read
from dsjax.config.load import ConfigError, load_run, load_with_origins
from dsjax.config.run import RunConfig
from dsjax.data.config import BPETokenizer, FileTokenizer, StdlibSource, TextSource
from dsjax.mesh.config import MeshConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.optimizers.kinds.lamb import LambConfig
from dsjax.optimizers.kinds.sgd import SGDConfig
from dsjax.setup.config import TrainConfig

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def problems(function, *arguments, **options) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    assert str(caught.value).split("\n") == list(caught.value.problems)
    return caught.value.problems


def write(folder: Path, **files: str) -> str:
    """Writes name__part=text to name/part.yaml; returns the path of the last."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(path)


# ---- all problems at once
def test_every_problem_is_reported_with_its_file(tmp_path):
    path = write(
        tmp_path,
        mesh="data: -1\nfsdp: -1\n",
        run="""
modle: 3
model: {kind: bloom, num_layer: 3, dropout: 2.0}
optimizer: {kind: adamww}
train: {steps: '3', tokns: 1e9}
mesh: mesh.yaml
seed: on
data: {sources: [{kind: text}], validation_fraction: 2}
""",
    )
    found = problems(
        load_run, path, ["trian.steps=3", "data.sources.1.path=x", "nonsense", "seed.x=1", "evaluate.rows=x"]
    )
    expected = [
        "--set: trian: unknown key; closest: train; allowed: name, seed, mesh",
        "--set: data.sources.1: data.sources has 1 items, numbered from 0; got '1'",
        "--set nonsense: write it as section.key=value",
        "--set: seed.x: seed has no parts: it is a whole number",
        f"{path}: modle: unknown key; given 3 (whole number); closest: model; allowed: name",
        f"{path}: seed: want a whole number; got 'on' (text)",
        f"{tmp_path}/mesh.yaml: mesh: only one axis may be -1",
        f"{path}: model.num_layer: unknown key for kind bloom; given 3 (whole number); closest: num_layers; allowed:",
        f"{path}: model: dropout must be in [0, 1); got 2.0",
        f"{path}: data.sources.0.path: missing; want text",
        f"{path}: optimizer.kind: unknown kind; given 'adamww' (text); closest: adamw; allowed: adamw, lamb, sgd",
        f"{path}: train.tokns: unknown key; given 1000000000.0 (number); closest: tokens; allowed: steps",
        f"{path}: train.steps: want a whole number; got '3' (text)",
        "--set: evaluate.rows: want a whole number; got 'x' (text)",
    ]
    assert len(found) == len(expected)
    for line, start in zip(sorted(found), sorted(expected), strict=True):
        assert line.startswith(start)


def test_a_required_section_says_what_it_needs(tmp_path):
    assert problems(load_run, write(tmp_path, run="")) == (
        f"{tmp_path}/run.yaml: train: give steps or tokens, one of them above 0; got steps 0, tokens 0",
    )


# ---- files
def test_sections_from_files(tmp_path):
    path = write(
        tmp_path,
        model__a="kind: gpt2\nmax_positions: 64\nnum_layers: 3\n",
        model__b="kind: bloom\nnum_layers: 5\n",
        optimizer="learning_rate: 1e-3\nschedule: schedule.yaml\n",
        schedule="kind: linear\nwarmup: 7\n",
        source="kind: text\npath: corpus\n",
        run__base="model: {file: ../model/a.yaml, num_heads: 6}\ntrain: {steps: 3}\nmesh:\n# nothing\n",
        run__child="""
file: base.yaml
train: {batch_size: 4}
optimizer: ../optimizer.yaml
data: {sources: [../source.yaml]}
""",
    )
    config = load_run(path)
    assert config.model == GPT2Config(max_positions=64, num_layers=3, num_heads=6)
    assert config.train == TrainConfig(steps=3, batch_size=4) and config.mesh == MeshConfig()
    assert config.optimizer.schedule.kind == "linear" and config.optimizer.schedule.warmup == 7
    assert config.data.sources == (TextSource(path="corpus"),)
    # Naming another file forgets the first: nothing of gpt2 may leak into bloom.
    write(tmp_path, run__other="file: base.yaml\nmodel: ../model/b.yaml\n")
    assert load_run(tmp_path / "run/other.yaml").model == BloomConfig(num_layers=5)
    assert load_run(path, [f"model={tmp_path}/model/b.yaml", "model.num_heads=4"]).model == BloomConfig(
        num_layers=5, num_heads=4
    )
    assert load_run(path, [f"model.file={tmp_path}/model/b.yaml"]).model == BloomConfig(num_layers=5)


def test_origins(tmp_path):
    path = write(tmp_path, mesh="data: 2\n", run="mesh: {file: mesh.yaml, fsdp: 2}\ntrain: {steps: 3}\n")
    config, origins = load_with_origins(path, ["seed=3", "data.sources.0.weight=2", "model.segments=[1,10,1]"])
    assert set(origins) == set(load.flatten(config))
    told = {dotted: origin for dotted, origin in origins.items() if origin != "default"}
    assert told == {
        "seed": "--set",
        "mesh.data": f"{tmp_path}/mesh.yaml",
        "mesh.fsdp": path,
        "train.steps": path,
        "data.sources.0.weight": "--set",
        "model.segments": "--set",
    }


def test_files_that_cannot_be_read(tmp_path):
    path = write(tmp_path, a="mesh: b.yaml\ntrain: {steps: 1}", b="file: c.yaml", c="file: b.yaml")
    assert "which leads back to itself" in problems(load_run, path.replace("c.yaml", "a.yaml"))[0]
    for index in range(10):
        path = write(tmp_path, **{f"d{index}": f"file: d{index + 1}.yaml"})
    (problem,) = problems(load_run, tmp_path / "d0.yaml")
    assert "more than 8 files deep" in problem
    path = write(tmp_path, run="mesh: a.yml\ntrain: {steps: 1}")
    (problem,) = problems(load_run, path)
    assert problem.startswith(f"{path}: mesh: no such file: {tmp_path}/a.yml; closest: a.yaml; allowed: a.yaml, b.yaml")
    with pytest.raises(FileNotFoundError, match=r"no such config file: nowhere\.yaml"):
        load_run("nowhere.yaml")
    assert problems(load_run, tmp_path) == (f"not a file: {tmp_path}; want a YAML file",)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    assert problems(load_run, tmp_path / "bytes.yaml") == (f"{tmp_path}/bytes.yaml: not UTF-8 at byte 3",)
    (tmp_path / "large.yaml").write_bytes(b"#" * (read.MAX_BYTES + 1))
    assert "over 1,048,576 bytes" in problems(load_run, tmp_path / "large.yaml")[0]
    (problem,) = problems(load_run, write(tmp_path, list="- 1\n- 2\n"))
    assert problem.endswith("holds a list of 2; want keys and values")


# ---- --set
RUN = "model: {kind: bloom, num_layers: 4}\noptimizer: {b2: 0.98}\ntrain: {steps: 3}\n"


def test_assignments(tmp_path):
    path = write(tmp_path, run=RUN)

    def run(*sets):
        return load_run(path, sets)

    assert run("train.steps=1e3", "train.steps=2e3").train.steps == 2000
    assert run("optimizer.learning_rate=1e-4").optimizer.learning_rate == 1e-4
    assert run("checkpoint.asynchronous=false").checkpoint.asynchronous is False
    assert run("model.segments=[1, 2, 1]").model.segments == (1, 2, 1)
    assert run("optimizer={kind: sgd, momentum: 0.5}").optimizer == SGDConfig(momentum=0.5)
    assert run(
        "data.sources=[{kind: text, path: a}, {kind: stdlib, weight: 3}]", "data.sources.0.path=b"
    ).data.sources == (
        TextSource(path="b"),
        StdlibSource(weight=3),
    )
    assert run("data.tokenizer.vocab_size=300").data.tokenizer == BPETokenizer(vocab_size=300)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("123", "123"), ("on", "on"), ("", ""), ("null", "null"), ("'123'", "123"), ('"a\\nb"', "a\nb"),
        ("10:20", "10:20"), ("def f(x):", "def f(x):"), ("- a", "- a"), (" a # b", " a # b"), ("it's", "it's"),
        ("a=b", "a=b"), ("[1", "[1"),
    ],
)  # fmt: skip
def test_text_is_taken_as_typed(tmp_path, typed, meant):
    assert load_run(write(tmp_path, run=RUN), [f"sample.prompt={typed}"]).sample.prompt == meant


def test_another_kind_drops_defaults_but_not_what_was_given(tmp_path):
    path = write(tmp_path, run=RUN)
    assert load_run(path, ["data.tokenizer.kind=byte"]).data.tokenizer.kind == "byte"
    sources = load_run(path, ["data.sources.0.kind=text", "data.sources.0.path=x"]).data.sources
    assert sources == (TextSource(path="x"),)
    assert load_run(path, ["optimizer.kind=lamb"]).optimizer == LambConfig(b2=0.98)
    (problem,) = problems(load_run, path, ["optimizer.kind=sgd"])
    assert problem.startswith(f"{path}: optimizer.b2: unknown key for kind sgd")
    (problem,) = problems(load_run, path, ["data.tokenizer.kind=file"])
    assert problem == "--set: data.tokenizer.path: missing; want text"
    assert load_run(path, ["data.tokenizer.kind=file", "data.tokenizer.path=t"]).data.tokenizer == FileTokenizer(
        path="t"
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.num_layer=3", "--set: model.num_layer: unknown key; closest: num_layers; allowed: "),
        ("model=nowhere.yaml", "--set: model: no such file: nowhere.yaml"),
        (
            "model=3",
            "--set: model: want a section with kind: gpt2 | bloom | llama | bert | pretrained, or the name of a file; "
            "got 3 (whole number)",
        ),
        ("model=a\0b", "--set: model.file: want the name of a YAML file"),
        ("model.file=3", "--set: model: want a section"),
        ("data.sources.x.path=3", "--set: data.sources.x: data.sources has 1 items, numbered from 0; got 'x'"),
        ("data.sources.0=3", "--set: data.sources.0: want a section with kind: stdlib"),
        ("train.steps", "--set train.steps: write it as section.key=value"),
        ("=3", "--set =3: write it as section.key=value"),
        ("a..b=3", "--set a..b=3: write it as section.key=value"),
        ("name={a: b}", "--set: name: want text; got a section with a"),
    ],
)
def test_assignments_that_are_wrong(tmp_path, assignment, message):
    (problem,) = problems(load_run, write(tmp_path, run=RUN), [assignment])
    assert problem.startswith(message)


# ---- nothing but ConfigError
WORDS = ["model", "train", "file", "kind", "steps", "sources", "data", "bloom", "mesh", "run.yaml", "0", "1e9", "\n  "]
PIECES = [*WORDS, *":{}[],\n '\"-&*!#=.~\0"]


@quick
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text(max_size=20))
def test_any_file_loads_or_is_refused(tmp_path, text):
    try:
        assert isinstance(load_run(write(tmp_path, run=text)), RunConfig)
    except ConfigError as error:
        assert error.problems and all(error.problems) and str(error).splitlines() == list(error.problems)


@quick
@given(st.lists(st.lists(st.sampled_from([*PIECES, ".", "=", "data.sources.0."]), max_size=9).map("".join), max_size=3))
def test_any_assignment_loads_or_is_refused(tmp_path, sets):
    try:
        assert isinstance(load_run(write(tmp_path, run=RUN), sets), RunConfig)
    except ConfigError as error:
        assert error.problems and all(error.problems) and str(error).splitlines() == list(error.problems)


# ---- keys under the names that they had
LENGTH = "train: {steps: 3}\ncurriculum: {length: {min: 8, schedule: {kind: fixed_linear, steps: 2, quantum: 8}"
OLD = r"under their old names, which still work: curriculum.length.how is curriculum.length.mode now$"


def test_an_old_key_works_everywhere_with_one_warning(tmp_path):
    path = write(tmp_path, base=LENGTH + ", how: reshape}}\n", run="file: base.yaml\nseed: 3\n")
    with pytest.warns(UserWarning, match=OLD) as found:
        config = load_run(path)
    assert config.curriculum.length.mode == "reshape" and len(found) == 1
    new = write(tmp_path, new=LENGTH + ", mode: reshape}}\n")
    assert load_run(new, ["seed=3"]) == config
    with pytest.warns(UserWarning, match=OLD):
        assert load_run(new, ["curriculum.length.how=truncate"]).curriculum.length.mode == "truncate"
    # A file that names another one: its new key goes over the old one.
    over = write(tmp_path, over="file: base.yaml\ncurriculum: {length: {mode: truncate}}\n")
    with pytest.warns(UserWarning, match=OLD):
        assert load_run(over).curriculum.length.mode == "truncate"
    # A run folder's config.yaml, as it was written before.
    written = load.to_dict(config)
    written["curriculum"]["length"]["how"] = written["curriculum"]["length"].pop("mode")
    with pytest.warns(UserWarning, match=OLD):
        assert load.decode(RunConfig, written, origin="config.yaml") == config


def test_an_old_key_beside_the_new_one_is_refused(tmp_path):
    path = write(tmp_path, run=LENGTH + ", how: reshape, mode: truncate}}\n")
    (problem,) = problems(load_run, path)
    assert problem == (
        f"{path}: curriculum.length.how: is the old spelling of mode, which is given, too; remove one of them"
    )
