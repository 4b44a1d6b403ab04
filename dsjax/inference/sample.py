"""The sample of text at the end of a run: what it asks for, checked before the first step, and how it is drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.inference.config import SampleConfig
from dsjax.inference.open import TrainedModel
from dsjax.inference.text import generate_text, plain_ids, plain_prompt
from dsjax.models.config import ModelConfig
from dsjax.models.families.family import architecture_of
from dsjax.models.generate import Generation, check_positions
from dsjax.models.sampling import Sampling
from dsjax.models.tree import ModelTree
from dsjax.observe.output import printable
from dsjax.runs.commands import command


def check_sample(sample: SampleConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse a sample that could not be drawn when training is over.

    Args:
        sample: what is asked for.
        model: what will write it.
        tokenizer: its tokenizer; None if it is not known yet: then a prompt counts as one token.

    Raises:
        ValueError: settings that mean nothing, a prompt without tokens, more tokens than the model has positions.

    Example:
        >>> from dsjax.data.tokenizers.tokenizer import byte_tokenizer
        >>> from dsjax.models.families.gpt2.config import GPT2Config
        >>> check_sample(SampleConfig(prompt="a"), GPT2Config(max_positions=64), byte_tokenizer())
        Traceback (most recent call last):
        ...
        ValueError: sample: a prompt of 1 tokens and 100 new ones need 101 positions, but the model has 64; shorten \
the prompt or ask for at most 63 tokens
    """
    if not sample.prompt:
        return
    try:
        Generation(max_new_tokens=sample.max_new_tokens, sampling=Sampling(temperature=sample.temperature))
        try:
            sample.prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {sample.prompt!r} is not UTF-8") from error
        length = 1
        if tokenizer is not None:
            length = len(plain_ids(tokenizer, sample.prompt))
            unknown = tokenizer.special_id("unk_token")
            if unknown is not None and set(tokenizer.encode(sample.prompt)) == {unknown}:
                raise ValueError(f"the tokenizer knows no token of the prompt {sample.prompt!r}; give another one")
        check_positions(architecture_of(model).max_positions, length, sample.max_new_tokens)
    except ValueError as error:
        raise ValueError(f"sample: {error}") from error


def draw_command(sample: SampleConfig, folder: Path) -> str:
    """The command that draws the sample from a run's last checkpoint."""
    # One word with the text: it may begin with a dash.
    words = (f"--prompt={sample.prompt}", "--max-new-tokens", str(sample.max_new_tokens))
    return command("generate", folder, *words, "--temperature", str(sample.temperature))


def draw(
    sample: SampleConfig,
    folder: Path,
    tokenizer: Tokenizer,
    model: ModelTree,
    weights: Callable[[], Any],
    console: Console,
    *,
    length: int,
    seed: int,
) -> str:
    """The prompt and what the model goes on with, shown as it is made.

    Args:
        sample: what is asked for.
        folder: of the run.
        tokenizer: of the run.
        model, weights: what is to write; weights are made only when it does.
        console: where it is shown.
        length: tokens in a row of the training.
        seed: of the draws.
    """
    if jax.process_count() > 1:
        options = draw_command(sample, folder)
        console.print(
            f"no sample is drawn with several processes; to draw one: {options}", soft_wrap=True, markup=False
        )
        return ""
    trained = TrainedModel(
        model=nnx.merge(model.graph, weights()),
        tokenizer=tokenizer,
        kind="run",
        path=folder,
        what="the parameters after the last step",
        step=None,
        trained_length=length,
        stop_tokens=frozenset({tokenizer.end_of_text}),
    )
    console.print("[bold]sample[/bold]: ", end="")
    options = Generation(
        max_new_tokens=sample.max_new_tokens,
        sampling=Sampling(temperature=sample.temperature),
        seed=seed,
    )
    show = lambda piece: console.print(printable(piece, console.encoding), end="", markup=False)
    [written] = generate_text(trained, [plain_prompt(trained, sample.prompt)], options=options, show=show)
    console.print()
    return sample.prompt + written.text
