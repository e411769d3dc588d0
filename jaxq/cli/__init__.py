"""The command line, `python -m jaxq`: one file per command, and `main` that knows them."""
