"""What programs cost: compiled, estimated, measured; and plans made from that."""
