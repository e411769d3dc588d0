"""MiniLM in plain JAX: sentence embeddings in float and in int8 on STS-B, and a report of what int8 does to it.

    python examples/minilm.py --model DIR --stsb DIR --html report.html --picture report.png
    python examples/minilm.py --model DIR --stsb DIR --integer

DIR of the model (all-MiniLM-L6-v2) holds `model.safetensors` and `vocab.txt`, DIR of STS-B `sts-dev.csv`, at any depth.
Nothing is downloaded. It prints Spearman's correlation of float and int8 with the human scores, and how long the report
took. `--html` writes the report as one page; `--picture` takes a screenshot of it with chromium. `--integer` runs the
encoder in integers alone, and prints how near its embeddings are to the float model's.
"""

import argparse
import functools
import json
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxq

LAYERS, HEADS, EPSILON = 6, 12, 1e-12
LENGTH, BATCH = 64, 32  # tokens of a sentence, sentences of a batch
REPORT_BATCHES = 8
REPEATS = 7
PICTURE_HEIGHT = 1274  # down to the end of a chart

# --- the model -------------------------------------------------------------------------------------------------------


def load_weights(path: Path) -> dict[str, Any]:
    """Read a safetensors file: parameters by path, kernels as [in, out]."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    params: dict[str, Any] = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        first, last = entry["data_offsets"]
        array = np.frombuffer(data[8 + size + first : 8 + size + last], "<f4").reshape(entry["shape"])
        *parents, leaf = name.split(".")
        is_kernel = leaf == "weight" and array.ndim == 2 and "embeddings" not in parents
        node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)
        node[leaf] = jnp.asarray(array.T if is_kernel else array)
    return params


def dense(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ layer["weight"] + layer["bias"][None, None]


def normalize(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + EPSILON) * layer["weight"][None, None] + layer["bias"][None, None]


def attend(layer: dict[str, Any], x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return multi-head self-attention, [batch, tokens, features]."""

    def heads(name: str) -> jax.Array:
        return dense(layer[name], x).reshape(*x.shape[:2], HEADS, -1)

    query, key, value = heads("query"), heads("key"), heads("value")
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, -1e9), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)


def features(params: dict[str, Any], tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Return what the encoder makes of each token: tokens and mask [batch, tokens] -> [batch, tokens, features]."""
    tables = params["embeddings"]
    x = jnp.take(tables["word_embeddings"]["weight"], tokens, axis=0)
    x = x + tables["position_embeddings"]["weight"][None, : tokens.shape[1]]
    x = normalize(tables["LayerNorm"], x + tables["token_type_embeddings"]["weight"][None, :1])
    for n in range(LAYERS):
        layer = params["encoder"]["layer"][str(n)]
        inner = layer["attention"]
        x = normalize(inner["output"]["LayerNorm"], x + dense(inner["output"]["dense"], attend(inner["self"], x, mask)))
        hidden = jax.nn.gelu(dense(layer["intermediate"]["dense"], x), approximate=False)
        x = normalize(layer["output"]["LayerNorm"], x + dense(layer["output"]["dense"], hidden))
    return x


def pooled(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return embeddings of length one, the mean over the tokens that are there: [batch, features]."""
    present = mask[..., None].astype(x.dtype)
    mean = (x * present).sum(1) / present.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def encode(params: dict[str, Any], tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Return embeddings of length one: tokens and mask [batch, tokens] -> [batch, features]."""
    return pooled(features(params, tokens, mask), mask)


# --- text ------------------------------------------------------------------------------------------------------------


class WordPiece:
    """BERT's uncased tokenizer: words and punctuation apart, each word in the longest pieces of the vocabulary."""

    def __init__(self, path: Path):
        self.numbers = {piece: n for n, piece in enumerate(path.read_text(encoding="utf-8").splitlines())}

    def __call__(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return token numbers and mask, [sentences, LENGTH]."""
        tokens = np.zeros((len(sentences), LENGTH), np.int32)
        for row, sentence in zip(tokens, sentences, strict=True):
            pieces = [p for word in _words(sentence) for p in self.pieces(word)][: LENGTH - 2]
            row[: len(pieces) + 2] = [self.numbers[p] for p in ("[CLS]", *pieces, "[SEP]")]
        return tokens, tokens != 0

    def pieces(self, word: str) -> list[str]:
        found, rest, prefix = [], word, ""
        while rest:
            end = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in self.numbers), None)
            if end is None:
                return ["[UNK]"]
            found.append(prefix + rest[:end])
            rest, prefix = rest[end:], "##"
        return found


def _words(sentence: str) -> list[str]:
    plain = [c for c in unicodedata.normalize("NFD", sentence.lower()) if unicodedata.category(c) != "Mn"]
    return "".join(f" {c} " if _is_punctuation(c) else c for c in plain).split()


def _is_punctuation(c: str) -> bool:
    return unicodedata.category(c).startswith("P") or (c.isascii() and c.isprintable() and not c.isalnum() and c != " ")


class Pairs(NamedTuple):
    """Pairs of sentences and how similar people found them, 0 to 5."""

    first: list[str]
    second: list[str]
    scores: np.ndarray


def load_pairs(path: Path) -> Pairs:
    """Read STS-B: tab-separated, score in the fifth column, sentences in the sixth and seventh."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return Pairs([r[5] for r in rows], [r[6] for r in rows], np.array([float(r[4]) for r in rows]))


# --- measuring -------------------------------------------------------------------------------------------------------


def batches(sentences: Sequence[str], tokenizer: WordPiece) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yield (tokens, mask) of BATCH sentences; the last one is filled up with empty sentences."""
    for start in range(0, len(sentences), BATCH):
        part = list(sentences[start : start + BATCH])
        tokens, mask = tokenizer(part + [""] * (BATCH - len(part)))
        yield jnp.asarray(tokens), jnp.asarray(mask)


def similarity(program: Any, weights: Any, pairs: Pairs, tokenizer: WordPiece) -> float:
    """Return Spearman's correlation of cosine similarity with the scores."""
    sides = []
    for sentences in (pairs.first, pairs.second):
        rows = [np.asarray(program(weights, *batch)) for batch in batches(sentences, tokenizer)]
        sides.append(np.concatenate(rows)[: len(sentences)])
    return spearman((sides[0] * sides[1]).sum(-1), pairs.scores)


def spearman(values: np.ndarray, others: np.ndarray) -> float:
    """Return the correlation of ranks."""
    return float(np.corrcoef(_ranks(values), _ranks(others))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[inverse]


def in_integers(params: dict[str, Any], tokenizer: WordPiece, pairs: Pairs, samples: Sequence) -> dict[str, float]:
    """Return how near the integer encoder's embeddings are to the float ones, and Spearman's correlation of each."""
    plan = jaxq.calibrate(features, jaxq.w8a8(static=True, symmetric=False))(params, samples)
    encoder = jaxq.integer(features, plan)(params, *samples[0])
    qparams = jaxq.convert(features, plan)(params, *samples[0])
    imitated, in_float = jax.jit(jaxq.quantize(features, plan)), jax.jit(features)
    programs: dict[str, Callable[..., Any]] = {
        "float": lambda *batch: in_float(params, *batch),
        "int8": lambda *batch: imitated(qparams, *batch),
        "integer": encoder,
    }

    def embedded(run: Callable[..., Any], sentences: Sequence[str]) -> np.ndarray:
        shown = tqdm(list(batches(sentences, tokenizer)), leave=False)
        return np.concatenate([np.asarray(pooled(run(*batch), batch[1])) for batch in shown])[: len(sentences)]

    sides = {name: [embedded(run, part) for part in (pairs.first, pairs.second)] for name, run in programs.items()}
    cosines = {
        f"{name}_cosine": float(np.mean([(a * b).sum(-1) for a, b in zip(sides[name], sides["float"], strict=True)]))
        for name in ("int8", "integer")
    }
    scores = {name: spearman((first * second).sum(-1), pairs.scores) for name, (first, second) in sides.items()}
    times = {name: [] for name in programs}
    for _ in range(REPEATS):  # taken in turns
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*samples[0]))
            times[name].append(time.perf_counter() - start)
    seconds = {f"{name}_seconds": float(np.median(taken)) for name, taken in times.items()}
    return {**cosines, **scores, **seconds}


def find(folder: Path, name: str) -> Path:
    """Return the file of this name under a folder; raise `FileNotFoundError` naming both."""
    found = sorted(folder.rglob(name))
    if not found:
        raise FileNotFoundError(f"no {name} under {folder}")
    return found[0]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="holds model.safetensors, vocab.txt")
    parser.add_argument("--stsb", type=Path, required=True, metavar="DIR", help="holds sts-dev.csv")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="and a screenshot of it, which needs chromium")
    parser.add_argument("--static", action="store_true", help="calibrated activation ranges")
    parser.add_argument("--integer", action="store_true", help="the encoder in integers alone, from the tokens on")
    parser.add_argument("--skip-scores", action="store_true", help="only the report")
    args = parser.parse_args(argv)
    params = load_weights(find(args.model, "model.safetensors"))
    tokenizer, pairs = WordPiece(find(args.model, "vocab.txt")), load_pairs(find(args.stsb, "sts-dev.csv"))
    samples = [b for b, _ in zip(batches(pairs.first, tokenizer), range(REPORT_BATCHES), strict=False)]
    if args.integer:
        result = in_integers(params, tokenizer, pairs, samples)
        print("\n".join(f"{name}: {value:.4f}" for name, value in result.items()))
        return result
    plan = jaxq.make_plan(encode, jaxq.w8a8(static=args.static))(params, *samples[0])
    if args.static:
        plan = jaxq.calibrate(encode, plan)(params, samples)
    start, busy = time.perf_counter(), time.process_time()
    report = jaxq.report(encode, plan)(params, samples)
    result = {"report_seconds": time.perf_counter() - start, "report_processor_seconds": time.process_time() - busy}
    print(report)
    if not args.skip_scores:
        qparams = jaxq.convert(encode, plan)(params, *samples[0])
        result["float"] = similarity(jax.jit(encode), params, pairs, tokenizer)
        result["int8"] = similarity(jax.jit(jaxq.quantize(encode, plan)), qparams, pairs, tokenizer)
    if args.html:
        report.to_html(args.html)
    if args.picture:
        from screenshot import screenshot

        page = report.to_html(args.html or args.picture.with_suffix(".html"))
        screenshot(page, args.picture, height=PICTURE_HEIGHT)
    print("\n".join(f"{name}: {value:.4f}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
