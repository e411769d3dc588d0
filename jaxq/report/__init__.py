"""What quantization does to a program, measured and shown: as a table, JSON, one HTML page, pictures."""
