"""The MiniLM example: its tokenizer, its reader of weights, its model at a small size, its correlation."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import minilm

WIDTH, HIDDEN = 24, 48


def _arrays():
    rng = np.random.default_rng(0)
    sizes = {"word": 30, "position": 80, "token_type": 2}
    arrays = {f"embeddings.{kind}_embeddings.weight": rng.normal(size=(n, WIDTH)) for kind, n in sizes.items()}
    layers = {"attention.self.query": 1, "attention.self.key": 1, "attention.self.value": 1}
    layers |= {"attention.output.dense": 1, "intermediate.dense": 2, "output.dense": 0.5}
    norms = ["embeddings.LayerNorm"]
    for n in range(minilm.LAYERS):
        for name, ratio in layers.items():
            shape = (HIDDEN if ratio == 2 else WIDTH, HIDDEN if ratio == 0.5 else WIDTH)
            arrays[f"encoder.layer.{n}.{name}.weight"] = rng.normal(size=shape) / 5
            arrays[f"encoder.layer.{n}.{name}.bias"] = rng.normal(size=shape[0]) / 5
        norms += [f"encoder.layer.{n}.attention.output.LayerNorm", f"encoder.layer.{n}.output.LayerNorm"]
    for name in norms:
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = 1 + rng.normal(size=WIDTH) / 9, rng.normal(size=WIDTH) / 9
    return {name: array.astype("<f4") for name, array in arrays.items()}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    header, data = {}, b""
    for name, array in _arrays().items():
        ends = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": ends}
        data += array.tobytes()
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return minilm.load_weights(path)


def test_weights_are_read_as_they_were_written(params):
    arrays = _arrays()
    table = params["embeddings"]["word_embeddings"]["weight"]
    np.testing.assert_array_equal(table, arrays["embeddings.word_embeddings.weight"])
    kernel = params["encoder"]["layer"]["5"]["intermediate"]["dense"]["weight"]
    np.testing.assert_array_equal(kernel, arrays["encoder.layer.5.intermediate.dense.weight"].T)


def test_embeddings_have_length_one_and_do_not_see_padding(params):
    tokens, mask = np.array([[1, 5, 6, 2, 0, 0]]), np.array([[True] * 4 + [False] * 2])
    whole = minilm.encode(params, tokens[:, :4], mask[:, :4])
    padded = minilm.encode(params, np.where(mask, tokens, 9), mask)
    np.testing.assert_allclose(whole, padded, atol=1e-5)
    assert np.linalg.norm(whole) == pytest.approx(1, abs=1e-5)
    assert np.abs(np.asarray(whole) - minilm.encode(params, tokens[:, :3], mask[:, :3])).max() > 1e-3


def test_words_are_cut_into_the_longest_pieces(tmp_path):
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "un", "##aff", "##able", "cafe", "!", "$", "##a"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = minilm.WordPiece(tmp_path / "vocab.txt")
    tokens, mask = tokenizer(["Unaffable café!$", "xyz un"])
    found = [[pieces[t] for t in row[keep]] for row, keep in zip(tokens, mask, strict=True)]
    assert found[0] == ["[CLS]", "un", "##aff", "##able", "cafe", "!", "$", "[SEP]"]
    assert found[1] == ["[CLS]", "[UNK]", "un", "[SEP]"]


def test_equal_values_share_their_rank():
    np.testing.assert_array_equal(minilm._ranks(np.array([3.0, 1.0, 3.0, 2.0])), [2.5, 0.0, 2.5, 1.0])


def test_pairs_are_read_and_a_missing_file_is_named(tmp_path):
    (tmp_path / "sts-dev.csv").write_text('genre\tfile\tyear\t1\t4.5\tA "b.\tC d.\nx\ty\tz\t2\t0.000\tE.\tF.\textra\n')
    pairs = minilm.load_pairs(minilm.find(tmp_path, "sts-dev.csv"))
    assert pairs.first == ['A "b.', "E."] and pairs.second == ["C d.", "F."] and pairs.scores.tolist() == [4.5, 0.0]
    with pytest.raises(FileNotFoundError, match="no vocab.txt under"):
        minilm.find(tmp_path, "vocab.txt")
