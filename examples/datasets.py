"""Load small image-classification datasets as float32 arrays [n, height, width, channels] in [0, 1].

`load("digits")` needs nothing but scikit-learn. The others read files that lie in a folder DIR, by default as

    DIR/mnist/package/data/{train,t10k}-{images-idx3,labels-idx1}-ubyte               plain IDX
    DIR/fashion_mnist/usr/share/datasets/fashion-mnist/...-ubyte.gz                   gzipped IDX, names as MNIST's
    DIR/cifar10/package/{data_batch_1,...,data_batch_5,test_batch}.png, {train,test}_lables.json

where the files may also lie directly in DIR/<name> or in DIR, and IDX files may be gzipped or not. Each row of a
CIFAR-10 PNG is one image: 1024 RGB pixels, 32 lines of 32. Nothing is downloaded. Errors name the file they are about.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

N_CLASSES = 10
DIGITS_TEST = 360  # of 1797
CIFAR_SIDE = 32


class Dataset(NamedTuple):
    """Images [n, height, width, channels] float32 in [0, 1], labels [n] int32 in [0, n_classes)."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    n_classes: int


class Source(NamedTuple):
    """A dataset made of files: where they lie under DIR by default, their names, how a folder of them is read."""

    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Dataset]


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """Load `name`, one of `NAMES`, from `folder`.

    Raises `FileNotFoundError` saying how the files should lie, `ValueError` naming a file with wrong contents, and
    `ImportError` naming the extra that is not installed.
    """
    if name == "digits":
        return _digits()
    if name not in SOURCES:
        raise ValueError(f"unknown dataset {name!r}; datasets are: {', '.join(NAMES)}")
    source = SOURCES[name]
    return source.read(_find(name, source, folder))


def _find(name: str, source: Source, folder: str | Path | None) -> Path:
    """The first folder, of the places that `load` documents, that holds all files of the dataset."""
    layout = "\n  ".join([f"\n{name} is read from", f"DIR/{source.folder}/", *(f"  {file}" for file in source.files)])
    layout += f"\nDIR is the folder that you name. They may also lie in DIR/{name} or in DIR, IDX files gzipped or not."
    if folder is None:
        raise FileNotFoundError(f"{name} needs a folder.{layout}")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no such folder: {folder}{layout}")
    places = [Path(folder, source.folder), Path(folder, name), Path(folder)]
    missing = {place: [file for file in source.files if not _exists(place / file)] for place in places}
    best = min(places, key=lambda place: len(missing[place]))
    if len(missing[best]) == len(source.files):
        raise FileNotFoundError(f"no files of {name} under {folder}{layout}")
    if missing[best]:
        raise FileNotFoundError(f"missing in {best}: {', '.join(missing[best])}{layout}")
    return best


def _exists(path: Path) -> bool:
    return path.is_file() or path.with_name(path.name + ".gz").is_file()


# --- scikit-learn's digits -------------------------------------------------------------------------------------------


def _digits() -> Dataset:
    """1797 images of 8x8 pixels with 17 levels of grey; always the same 360 of them are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    order = np.random.RandomState(0).permutation(len(images))  # RandomState: the same on every NumPy
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return Dataset(images[train], labels[train], images[test], labels[test], N_CLASSES)


# --- IDX: magic number [0, 0, dtype, ndim], big-endian uint32 sizes, data --------------------------------------------

IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
UBYTE = 0x08


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not, as a uint8 array of `ndim` dimensions."""
    path = path if path.is_file() else path.with_name(path.name + ".gz")
    data = _read_bytes(path)
    header = 4 + 4 * ndim
    magic = bytes([0, 0, UBYTE, ndim])
    if data[:4] != magic or len(data) < header:
        raise ValueError(f"{path}: not an IDX file of {ndim} dimensions: starts with {data[:4]!r}, expected {magic!r}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4))
    if len(data) != header + math.prod(shape):
        raise ValueError(f"{path}: {len(data)} bytes, but shape {shape} needs {header + math.prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error


def _mnist(folder: Path) -> Dataset:
    train_images, train_labels, test_images, test_labels = (folder / file for file in IDX_FILES)
    train = _labelled(read_idx(train_images, 3)[..., None], read_idx(train_labels, 1), train_labels)
    test = _labelled(read_idx(test_images, 3)[..., None], read_idx(test_labels, 1), test_labels)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"{test_images}: images of {test[0].shape[1:]}, but {train[0].shape[1:]} in {train_images}")
    return Dataset(*train, *test, N_CLASSES)


# --- CIFAR-10 as PNG and JSON ----------------------------------------------------------------------------------------

CIFAR_TRAIN = tuple(f"data_batch_{i}.png" for i in range(1, 6))
CIFAR_TEST = ("test_batch.png",)
CIFAR_TRAIN_LABELS, CIFAR_TEST_LABELS = "train_lables.json", "test_lables.json"  # sic


def read_png_batch(path: Path) -> np.ndarray:
    """Read a PNG of n rows x 1024 RGB pixels as n images: uint8 [n, 32, 32, 3]."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("CIFAR-10 is stored as PNG, which needs Pillow: pip install 'jaxq[examples]'") from error
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a whole PNG image ({error})") from error
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (CIFAR_SIDE**2, 3):
        raise ValueError(f"{path}: {pixels.dtype} of shape {pixels.shape}, expected uint8 of (n, {CIFAR_SIDE**2}, 3)")
    return pixels.reshape(-1, CIFAR_SIDE, CIFAR_SIDE, 3)


def read_json_labels(path: Path) -> np.ndarray:
    """Read a JSON list of integers."""
    try:
        labels = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: expected a list of integers")
    return np.array(labels, np.int64)


def _cifar10(folder: Path) -> Dataset:
    def part(images: Sequence[str], labels: str) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.concatenate([read_png_batch(folder / file) for file in images])
        return _labelled(pixels, read_json_labels(folder / labels), folder / labels)

    return Dataset(*part(CIFAR_TRAIN, CIFAR_TRAIN_LABELS), *part(CIFAR_TEST, CIFAR_TEST_LABELS), N_CLASSES)


# --- both ------------------------------------------------------------------------------------------------------------


def _labelled(pixels: np.ndarray, labels: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images as float32 in [0, 1] and labels as int32, checked against each other; `path` is the file of the labels."""
    if len(pixels) != len(labels) or not len(labels):
        raise ValueError(f"{path}: {len(labels)} labels for {len(pixels)} images")
    if labels.min() < 0 or labels.max() >= N_CLASSES:
        raise ValueError(f"{path}: labels from {labels.min()} to {labels.max()}, expected 0 to {N_CLASSES - 1}")
    return pixels.astype(np.float32) / np.float32(255), labels.astype(np.int32)


SOURCES = {
    "mnist": Source("mnist/package/data", IDX_FILES, _mnist),
    "fashion_mnist": Source("fashion_mnist/usr/share/datasets/fashion-mnist", IDX_FILES, _mnist),
    "cifar10": Source("cifar10/package", (*CIFAR_TRAIN, *CIFAR_TEST, CIFAR_TRAIN_LABELS, CIFAR_TEST_LABELS), _cifar10),
}
NAMES = ("digits", *SOURCES)
