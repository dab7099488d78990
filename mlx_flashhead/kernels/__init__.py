"""The three steps of FlashHead decoding, one file a step (paper, section 3)."""
