"""One program, interpreted several ways: watched, imitated in low precision, run in integers, converted."""
