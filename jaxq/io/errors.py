"""The one error of everything that reads or writes files."""

import os


class FileError(ValueError):
    """A file that cannot be read or written: names the file, what is wrong with it and what to do.

    >>> import jaxq
    >>> try:
    ...     jaxq.load("/nowhere/model.safetensors")
    ... except jaxq.FileError as error:
    ...     print(error)
    /nowhere/model.safetensors: there is no such file; check the path
    """

    def __init__(self, path: str | os.PathLike, problem: str):
        super().__init__(f"{os.fspath(path)}: {problem}")
