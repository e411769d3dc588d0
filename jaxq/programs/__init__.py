"""What a program is: its operations, where its values come from, which of its operations can be quantized."""
