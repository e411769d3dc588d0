"""Models on disk: saved, exported, and in the formats of other systems."""
