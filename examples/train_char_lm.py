# SPDX-License-Identifier: Apache-2.0
"""Train a small character-level GPT with Equinox, on English text that every Python carries.

    pip install "eqx-flash[examples]"
    python examples/train_char_lm.py

Takes about two minutes on two CPU cores. The same code on a GPU computes in bfloat16, so that on
Hopper its attention runs on the flash kernel.
"""

import argparse
import math
import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray
from matplotlib.figure import Figure
from tqdm import trange

import eqx_flash

VOCABULARY = 128  # the codes of ASCII
HEAD_SIZE = 64


# ---- Data ----------------------------------------------------------------------------------------


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """Python's help texts as character codes: nine tenths to train on, the rest held out."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in paragraphs]
    # Topics quote one another at length. A paragraph is kept once, so that none is in both parts.
    text = "\n\n".join(dict.fromkeys(paragraphs))
    codes = np.frombuffer(text.encode("ascii", errors="replace"), np.uint8).astype(np.int32)
    cut = text.index("\n\n", len(text) * 9 // 10) + len("\n\n")
    return codes[:cut], codes[cut:]


def random_windows(rng: np.random.Generator, codes: np.ndarray, count: int, length: int):
    starts = rng.integers(len(codes) - length, size=(count, 1), endpoint=True)
    return codes[starts + np.arange(length)]


def all_windows(codes: np.ndarray, length: int) -> np.ndarray:
    return codes[: len(codes) // length * length].reshape(-1, length)


def decode(codes: Int[np.ndarray | Array, " length"]) -> str:
    return bytes(np.asarray(codes, np.uint8)).decode("ascii")


# ---- Model ---------------------------------------------------------------------------------------


class Block(eqx.Module):
    """A pre-norm transformer block."""

    attention_norm: eqx.nn.RMSNorm
    attention: eqx_flash.nn.MultiheadAttention
    mlp_norm: eqx.nn.RMSNorm
    mlp: eqx.nn.MLP

    def __init__(self, width: int, head_size: int = HEAD_SIZE, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = eqx.nn.RMSNorm(width)
        self.attention = eqx_flash.nn.MultiheadAttention(
            num_heads=width // head_size, query_size=width, is_causal=True, key=attention_key
        )
        self.mlp_norm = eqx.nn.RMSNorm(width)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, depth=1, activation=jax.nn.gelu, key=mlp_key)

    def __call__(self, x: Float[Array, "seq width"]) -> Float[Array, "seq width"]:
        y = jax.vmap(self.attention_norm)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(jax.vmap(self.mlp_norm)(x))


class GPT(eqx.Module):
    """Maps a text to the logits of the character that follows each of its characters."""

    characters: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm
    readout: eqx.nn.Linear

    def __init__(
        self, context: int, width: int, depth: int, head_size: int = HEAD_SIZE, *, key: PRNGKeyArray
    ):
        characters_key, positions_key, readout_key, *block_keys = jax.random.split(key, 3 + depth)
        self.characters = eqx.nn.Embedding(VOCABULARY, width, key=characters_key)
        self.positions = eqx.nn.Embedding(context, width, key=positions_key)
        self.blocks = [Block(width, head_size, key=block_key) for block_key in block_keys]
        self.norm = eqx.nn.RMSNorm(width)
        self.readout = eqx.nn.Linear(width, VOCABULARY, key=readout_key)

    def __call__(self, codes: Int[Array, " seq"]) -> Float[Array, "seq vocabulary"]:
        x = jax.vmap(self.characters)(codes) + self.positions.weight[: len(codes)]
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.readout)(jax.vmap(self.norm)(x))


# ---- Training ------------------------------------------------------------------------------------


def cast(model: GPT, dtype: DTypeLike) -> GPT:
    """A copy that computes in `dtype`. The optimizer's own parameters stay in float32."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, model)


def loss_fn(model: GPT, windows: Int[Array, "batch length"], dtype: DTypeLike) -> Float[Array, ""]:
    """Bits per character: how surprising each character is after those before it."""
    # The model takes one text. Under vmap its attention is still one kernel call per block.
    logits = jax.vmap(cast(model, dtype))(windows[:, :-1]).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return nats.mean() / math.log(2)


@eqx.filter_jit
def train_step(model, opt_state, optimizer, windows, dtype):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, windows, dtype)
    updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), opt_state, loss


@eqx.filter_jit
def evaluate(model, windows, batch, dtype):
    losses = jax.lax.map(lambda w: loss_fn(model, w[None], dtype), windows, batch_size=batch)
    return losses.mean()


@eqx.filter_jit
def sample(model, prompt, length, dtype, key):
    """`length` characters that continue `prompt`, which fills the context."""

    def next_character(window, key):
        logits = cast(model, dtype)(window)[-1].astype(jnp.float32)
        code = jax.random.categorical(key, logits / 0.7)  # below 1: likely characters likelier
        return jnp.append(window[1:], code), code

    _, codes = jax.lax.scan(next_character, prompt, jax.random.split(key, length))
    return codes


def flash_kernels(program: jax.stages.Compiled) -> str:
    """The attention kernels that a compiled program calls, and how often."""
    calls = Counter(re.findall(r'custom_call_target="(eqx_flash_\w+)"', program.as_text() or ""))
    return ", ".join(f"{name} x {n}" for name, n in sorted(calls.items())) or "none"


def train(model: GPT, train_codes: np.ndarray, held_out: np.ndarray, dtype: DTypeLike, args):
    """Returns the trained model, the loss of every step, and held-out losses by step."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.02, args.steps // 20, args.steps)
    optimizer = optax.contrib.muon(schedule)  # needs half the steps of Adam here
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    # Compiled here to be looked at; the loop below takes this program, too.
    windows = np.zeros((args.batch, args.context + 1), np.int32)
    lowered = train_step.lower(model, opt_state, optimizer, windows, dtype)
    print(f"kernels     {flash_kernels(lowered.compile().compiled)} in the compiled step\n")

    rng = np.random.default_rng(args.seed)
    train_losses, held_out_losses = [], {}
    with trange(1, args.steps + 1, unit="step") as progress:
        for step in progress:
            windows = random_windows(rng, train_codes, args.batch, args.context + 1)
            model, opt_state, loss = train_step(model, opt_state, optimizer, windows, dtype)
            train_losses.append(loss)
            if step % args.report_every == 0 or step == args.steps:
                recent = np.mean(train_losses[-args.report_every :])
                held_out_losses[step] = float(evaluate(model, held_out, args.batch, dtype))
                progress.write(
                    f"step {step:5}  train {recent:.3f}  held-out {held_out_losses[step]:.3f}  "
                    "bits/character"
                )
    return model, train_losses, held_out_losses


def plot(train_losses: list, held_out_losses: dict[int, float], folder: Path) -> Path:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(train_losses) + 1), np.array(train_losses), alpha=0.5, label="train")
    axes.plot(*zip(*held_out_losses.items(), strict=True), "o-", label="held-out")
    axes.set(xlabel="step", ylabel="bits per character", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "loss.png"
    figure.savefig(path, dpi=150)
    return path


# ---- Command line --------------------------------------------------------------------------------


def parse_args(longest_context: int) -> argparse.Namespace:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Train a small character-level GPT on Python's help texts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=400, help="optimizer steps")
    parser.add_argument("--batch", type=positive, default=16, help="texts in a step")
    parser.add_argument("--context", type=positive, default=128, help="characters in a text")
    parser.add_argument("--width", type=positive, default=128, help="channels of the model")
    parser.add_argument("--depth", type=positive, default=4, help="blocks of the model")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, batches and sample")
    parser.add_argument("--report-every", type=positive, default=50, help="steps between reports")
    parser.add_argument(
        "--out", type=Path, default=Path("build/train_char_lm"), help="folder of the loss curve"
    )
    args = parser.parse_args()
    if args.width % HEAD_SIZE:
        parser.error(f"argument --width: expected a multiple of {HEAD_SIZE}, got {args.width}")
    if args.context > longest_context:
        parser.error(f"argument --context: expected at most {longest_context}, got {args.context}")
    return args


def main() -> None:
    train_codes, held_out_codes = load_text()
    args = parse_args(longest_context=len(held_out_codes) - 1)
    held_out = all_windows(held_out_codes, args.context + 1)
    # The kernel takes 16-bit numbers; a CPU is faster with 32.
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model_key, sample_key = jax.random.split(jax.random.key(args.seed))
    model = GPT(args.context, args.width, args.depth, key=model_key)

    size = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    heads_shape = (args.batch, args.context, args.width // HEAD_SIZE, HEAD_SIZE)
    heads = jax.ShapeDtypeStruct(heads_shape, dtype)
    print(f"text        {len(train_codes):,} characters, and {len(held_out_codes):,} held out")
    print(f"model       {size:,} parameters, computing in {jnp.dtype(dtype).name}")
    print(f"attention   {eqx_flash.explain(heads, heads, heads, is_causal=True)}")

    model, train_losses, held_out_losses = train(model, train_codes, held_out, dtype, args)

    prompt = held_out[1, : args.context]
    continuation = sample(model, prompt, 400, dtype, sample_key)
    print("\nHeld-out text, and after | the model's own:\n")
    print(f"{decode(prompt)}|{decode(continuation)}\n")
    print(f"held-out    {held_out_losses[args.steps]:.3f} bits/character")
    print(f"loss curve  {plot(train_losses, held_out_losses, args.out)}")


if __name__ == "__main__":
    main()
