"""Files that are broken or hostile, disks that are full: an error that names the file, and nothing lost."""

import contextlib
import json
import os
import random
import re
import resource
import stat
import struct
import tracemalloc
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.io import replace
from jaxq.io.checkpoint import INDEX

X = jnp.ones((2, 32))
PARAMS = {"up": jnp.asarray(np.random.default_rng(0).normal(size=(32, 40)), jnp.float32), "b": jnp.ones((1, 40))}
QUANTIZERS = {"int4": jaxq.int4(group=16), "kmeans": jaxq.kmeans(5), "nvfp4": jaxq.nvfp4(16)}


def f(params, x):
    return x @ params["up"] + params["b"]


def converted(policy):
    plan = jaxq.make_plan(f, policy)(PARAMS, X)
    return jaxq.convert(f, plan)(PARAMS, X), plan


@pytest.fixture(scope="module")
def models():
    return {name: converted(jaxq.weight_only(q)) for name, q in QUANTIZERS.items()}


@pytest.fixture
def path(models, tmp_path):
    jaxq.save(tmp_path / "model.safetensors", *models["int4"])
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(models, tmp_path):
    jaxq.save(tmp_path / "model", *models["int4"], shard_bytes=100)
    return tmp_path / "model"


def parts(data: bytes) -> tuple[dict, bytes]:
    """Return header and arrays' bytes, the checksum left out."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length : -4]


def sealed(header: dict | bytes, arrays: bytes) -> bytes:
    """Return a file with a right checksum, whatever it holds."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + arrays
    return data + struct.pack("<I", zlib.crc32(data))


def refused(path, match):
    with pytest.raises(jaxq.FileError, match=match) as caught:
        jaxq.load(path)
    assert str(path) in str(caught.value)


# --- broken -----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(path):
    data = bytearray(path.read_bytes())
    for position in random.Random(0).sample(range(len(data)), 150):
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        refused(path, "not an intact")
        data[position] ^= 1 << position % 8
    path.write_bytes(data)
    jaxq.load(path)


def test_every_truncation_is_found(path):
    data = path.read_bytes()
    for end in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 5, len(data) - 4, len(data) - 1):
        path.write_bytes(data[:end])
        refused(path, "not an intact|cannot be read")
    path.write_bytes(data + b"\0")
    refused(path, "not an intact")


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path / "none", "no such file")
    refused(tmp_path, "no such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def edit(path, change):
    header, arrays = parts(path.read_bytes())
    path.write_bytes(sealed(change(header) or header, arrays))


def metadata(key, change):
    def edited(header):
        header["__metadata__"][key] = change(header["__metadata__"][key])

    return edited


HUGE = 2**62
LIES = {
    "another version": (metadata("jaxq", lambda _: "2"), "format 1 but '2'"),
    "no version": (lambda h: h.pop("__metadata__") and None, "not of jaxq's format"),
    "a deep tree": (metadata("tree", lambda _: "[" * 50_000), "nested too deeply"),
    "a deep plan": (metadata("plan", lambda _: '{"a":' * 50_000), "nested too deeply"),
    "NaN": (metadata("tree", lambda t: t.replace("40", "NaN")), "NaN is not JSON"),
    "infinity": (metadata("tree", lambda t: t.replace("40", "1e999")), "finite"),
    "many values": (metadata("tree", lambda _: "[" + "[]," * 300_000 + "[]]"), "more than a file of this size"),
    "a huge header": (lambda h: b" " * 8 + json.dumps(h).encode() + b"[" * 300_000, "not an intact"),
    "a huge shape": (lambda h: h["b"].update(shape=[HUGE, HUGE]), "does not fill"),
    "an empty huge shape": (lambda h: h["b"].update(shape=[0, HUGE, HUGE]), "does not fill"),
    "a negative shape": (lambda h: h["b"].update(shape=[-1, -40]), "no proper shape"),
    "a fraction": (lambda h: h["b"].update(shape=[1.0, 40]), "no proper shape"),
    "many axes": (lambda h: h["b"].update(shape=[1] * 100 + [40]), "no proper shape"),
    "another dtype": (lambda h: h["b"].update(dtype="I32"), "should be float32"),
    "a wider dtype": (lambda h: h["b"].update(dtype="F64"), "does not fill"),
    "an unknown dtype": (lambda h: h["b"].update(dtype="O"), "unknown dtype"),
    "signed codes": (lambda h: h["up.stored"].update(dtype="I8"), "not an intact"),
    "overlap": (lambda h: h["b"].update(data_offsets=h["up.scale"]["data_offsets"], shape=[2, 40]), "overlap|fill"),
    "offsets beyond the file": (lambda h: h["b"].update(data_offsets=[0, HUGE]), "leaves the file"),
    "offsets backwards": (lambda h: h["b"].update(data_offsets=h["b"]["data_offsets"][::-1]), "leaves the file"),
    "a missing array": (lambda h: h.update(x=h.pop("b")), "not an intact"),
    "another type": (metadata("tree", lambda t: t.replace('"QArray"', '"os.system"')), "os.system"),
    "another format": (metadata("tree", lambda t: t.replace('"bits":4', '"bits":2')), "packing|plan says"),
    "a format of code": (metadata("plan", lambda t: t.replace('"Int"', '"eval"')), "eval"),
    "a text for a number": (metadata("plan", lambda t: t.replace('"terms": 32', '"terms": "many"')), "terms"),
    "negative terms": (metadata("plan", lambda t: t.replace('"terms": 32', '"terms": -32')), "'up'.*sums -32 terms"),
    "a dtype of code": (
        metadata("plan", lambda t: t.replace('"dtype": "float32"', '"dtype": ",f4"')),
        "'up'.*dtype ',f4'",
    ),
    "an absurd shape": (metadata("plan", lambda t: t.replace("[2, 40]", f"[{HUGE}, {HUGE}]")), "'up'.*puts out"),
    "an axis too many": (metadata("plan", lambda t: t.replace('"contracted": [0]', '"contracted": [7]')), "axes .7."),
    "another length": (metadata("tree", lambda t: t.replace('"packing":[-1,40]', '"packing":[-1,400000]')), "packing"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_under_a_right_checksum_are_refused(path, name):
    change, match = LIES[name]
    before = path.read_bytes()
    edit(path, change)
    assert path.read_bytes() != before
    refused(path, match)


def test_a_plan_of_another_model_is_refused(path, models, tmp_path):
    other, plan = converted(jaxq.w8a8())
    edit(path, metadata("plan", lambda _: plan.to_json()))
    refused(path, "another plan")
    renamed = jaxq.make_plan(lambda p, x: x @ p["down"], jaxq.w8a8())({"down": PARAMS["up"]}, X)
    edit(path, metadata("plan", lambda _: renamed.to_json()))
    refused(path, "'down'.*another model")
    with pytest.raises(ValueError, match="another plan"):
        jaxq.save(tmp_path / "new", models["int4"][0], plan)
    with pytest.raises(ValueError, match="no site of the plan quantizes it"):
        jaxq.save(tmp_path / "new", other, jaxq.make_plan(f, None)(PARAMS, X))
    assert not (tmp_path / "new").exists()


def test_a_tree_of_another_model_is_refused(path):
    for like, match in [
        ({"up": PARAMS["up"]}, "1 leaves more"),
        ({**PARAMS, "c": X}, "holds no 'c'"),
        ({**PARAMS, "b": X}, "'b' is"),
    ]:
        with pytest.raises(jaxq.FileError, match=match):
            jaxq.load(path, like=like)


@pytest.mark.parametrize("leaf, match", [(object(), "'a/0' is <object"), (np.array("text"), "cast it")])
def test_what_cannot_be_saved_is_named(tmp_path, leaf, match):
    with pytest.raises(TypeError, match=match):
        jaxq.save(tmp_path / "x", {"a": [leaf], **PARAMS}, jaxq.make_plan(f, None)(PARAMS, X))
    assert list(tmp_path.iterdir()) == []


# --- folders ----------------------------------------------------------------------------------------------------------


def reindexed(folder, change):
    index = json.loads((folder / INDEX).read_text())
    del index["crc32"]
    change(index)
    index["crc32"] = zlib.crc32(json.dumps(index, sort_keys=True).encode())
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/../../x", "model-00001-of-00001-0.safetensors"]
)
def test_shard_names_stay_in_the_folder(folder, name):
    reindexed(folder, lambda index: index["weight_map"].update({"b": name}))
    refused(folder, "not the name of a shard")


def test_shards_belong_to_their_index(folder, models, tmp_path):
    shards = sorted(p for p in folder.iterdir() if p.name != INDEX)
    one, two = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(two)
    with pytest.raises(jaxq.FileError, match="another file than the index was written for"):
        jaxq.load(folder)
    shards[0].write_bytes(one)
    reindexed(folder, lambda index: index["weight_map"].pop("b"))
    with pytest.raises(jaxq.FileError, match="shards|no such|not an intact"):
        jaxq.load(folder)
    shards[1].unlink()
    with pytest.raises(jaxq.FileError):
        jaxq.load(folder)


def test_a_flipped_bit_in_the_index_is_found(folder):
    text = (folder / INDEX).read_text()
    for found in list(re.finditer(r"\d", text))[::20]:
        at = found.start()
        (folder / INDEX).write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
        refused(folder, "not an intact index")


# --- disks ------------------------------------------------------------------------------------------------------------


def limited(bytes_, call):
    """Call with files limited in size, as a full disk limits them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        with pytest.raises(jaxq.FileError, match="cannot be written.*unchanged"):
            call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_old_file_survives_a_full_disk(path, models):
    before = contents(path.parent)
    limited(2000, lambda: jaxq.save(path, *models["kmeans"]))
    assert contents(path.parent) == before


@pytest.mark.parametrize("limit", [200, 900, 1500])
def test_the_old_folder_survives_a_full_disk(folder, models, limit):
    before = contents(folder)
    limited(limit, lambda: jaxq.save(folder, *models["kmeans"], shard_bytes=100))
    assert contents(folder) == before
    jaxq.save(folder, *models["kmeans"], shard_bytes=100)
    assert set(contents(folder)) & set(before) <= {INDEX, *before}
    assert jaxq.load(folder)[1] == models["kmeans"][1]
    assert len(contents(folder)) == 1 + len(json.loads((folder / INDEX).read_text())["weight_map"])


def test_the_old_file_survives_a_disk_that_turns_read_only(path, models, monkeypatch):
    before = contents(path.parent)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(replace.os, "replace", refuse)
    with pytest.raises(jaxq.FileError, match="Read-only"):
        jaxq.save(path, *models["kmeans"])
    assert contents(path.parent) == before


def test_paths_that_cannot_be_written_are_named(path, models):
    for bad in (path.parent, path / "under_a_file"):
        with pytest.raises(jaxq.FileError, match="cannot be"):
            jaxq.save(bad, *models["int4"])
    with pytest.raises(jaxq.FileError, match="cannot be made a folder"):
        jaxq.save(path, *models["int4"], shard_bytes=10)
    assert stat.S_ISREG(path.stat().st_mode)


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def flip(rng, out, at, donor):
    out[at : at + 1] = bytes([out[at] ^ 1 << rng.randrange(8)])


def replace_byte(rng, out, at, donor):
    out[at : at + 1] = rng.choice([b"0", b"9", b"-", b"[", b"]", b"{", b'"', b",", b"\xff", b"e"])


def cut(rng, out, at, donor):
    del out[at : at + rng.choice([1, 2, 8, 64])]


def graft(rng, out, at, donor):
    start = rng.randrange(len(donor))
    out[at:at] = donor[start : start + rng.choice([1, 4, 32])]


def truncate(rng, out, at, donor):
    del out[rng.randrange(9, len(out)) :]


def renumber(rng, out, at, donor):
    numbers = [match.span() for match in re.finditer(rb"\d+", bytes(out))]
    begin, end = rng.choice(numbers)
    out[begin:end] = rng.choice([b"0", b"1", b"255", b"-1", b"4294967296", b"1e9", b"99999999999999"])


def rename(rng, out, at, donor):
    names = [match.span() for match in re.finditer(rb'"[A-Za-z_0-9]+\\?"', bytes(out))]
    (a, b), (c, d) = rng.choice(names), rng.choice(names)
    out[a:b] = out[c:d]


EDITS = (flip, replace_byte, cut, graft, truncate, renumber, rename)


def mutated(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """Return a file with one to three random edits, most of them in its header; most sealed with a right checksum."""
    out = bytearray(data)
    length = struct.unpack("<Q", data[:8])[0]
    edits = rng.choices(EDITS, weights=(3, 3, 2, 2, 1, 4, 4), k=rng.randint(1, 3))
    for edit in edits:
        if len(out) > 200:
            edit(rng, out, rng.randrange(8, 8 + length if rng.random() < 0.7 else len(out)) % len(out), donor)
    if rng.random() < 0.8 and len(out) > 16:
        out[:8] = struct.pack("<Q", max(0, length + len(out) - len(data)))
        out[-4:] = struct.pack("<I", zlib.crc32(out[:-4]))
    return bytes(out)


def edited(rng: random.Random, data: bytes) -> bytes:
    """Return a text with one to three random edits."""
    out = bytearray(data)
    for change in rng.choices((flip, replace_byte, cut, graft, renumber, rename), k=rng.randint(1, 3)):
        change(rng, out, rng.randrange(len(out)), data)
    return bytes(out)


def fuzz(models, path, count):
    """Load mutated files; return how many were refused, and the peak of memory over that of the file."""
    originals = []
    for qparams, plan in models.values():
        jaxq.save(path, qparams, plan)
        originals.append(path.read_bytes())
    rng, refusals, worst = random.Random(0), 0, 0.0
    tracemalloc.start()
    try:
        for _ in range(count):
            data = mutated(rng, rng.choice(originals), rng.choice(originals))
            path.write_bytes(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                qparams, plan = jaxq.load(path)
                str(plan), repr(qparams)
            except jaxq.FileError:
                refusals += 1
            worst = max(worst, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return refusals, worst


def test_mutated_files_are_refused_or_read(models, tmp_path):
    refusals, worst = fuzz(models, tmp_path / "m", 2000)
    assert 1500 < refusals <= 2000
    # The files are of 6 kB; what is fixed in the parsers' memory weighs more than what follows the file.
    assert worst < 10**6


def test_mutated_folders_are_refused_or_read(folder, models):
    originals = {path: path.read_bytes() for path in folder.iterdir()}
    rng, index = random.Random(0), folder / INDEX
    for number in range(300):
        text = edited(rng, originals[index])
        index.write_bytes(text)
        if number % 3:
            with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):
                reindexed(folder, lambda _: None)
        with contextlib.suppress(jaxq.FileError):
            jaxq.load(folder)
    index.write_bytes(originals[index])
    assert jaxq.load(folder)[1] == models["int4"][1]


def test_mutated_checkpoints_of_others_are_refused_or_read(models, tmp_path):
    jaxq.save_compressed_tensors(tmp_path, *models["int4"])
    weights, config = (tmp_path / name for name in ("model.safetensors", "config.json"))
    originals = weights.read_bytes(), config.read_bytes()
    rng, refusals = random.Random(0), 0
    for _ in range(300):
        weights.write_bytes(mutated(rng, originals[0], originals[1]) if rng.random() < 0.7 else originals[0])
        config.write_bytes(edited(rng, originals[1]) if rng.random() < 0.5 else originals[1])
        try:
            jaxq.load_compressed_tensors(tmp_path)
        except jaxq.FileError:
            refusals += 1
    assert 100 < refusals < 300


@pytest.mark.long
def test_a_hundred_thousand_mutated_files_are_refused_or_read(models, tmp_path):
    refusals, worst = fuzz(models, tmp_path / "m", 100_000)
    assert 75_000 < refusals <= 100_000
    assert worst < 10**6
