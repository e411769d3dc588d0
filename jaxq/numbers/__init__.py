"""How numbers are stored: formats, quantized arrays, quantizers, calibrators. Knows nothing of programs."""
