"""Whole programs in integers: from the codes of the inputs to the codes of the outputs."""
